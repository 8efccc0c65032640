// A receiver in Node: takes a delivery on stdin, {secret, headers, body}, and prints the event if it is genuine.
// Exit code 3 and the reason on stderr: the package refused it. Anything else is a fault of this script.
"use strict";

const { readFileSync } = require("node:fs");
const { Webhook, WebhookVerificationError } = require("standardwebhooks");

const { secret, headers, body } = JSON.parse(readFileSync(0, "utf8"));
try {
  const event = new Webhook(secret).verify(Buffer.from(body, "base64"), headers);
  process.stdout.write(JSON.stringify(event));
} catch (error) {
  if (!(error instanceof WebhookVerificationError)) throw error;
  process.stderr.write(error.message);
  process.exitCode = 3;
}
