// A receiver in Node that has no secret: takes {jwk, signed, signature} on stdin, and prints whether `signature` is of
// `signed` under the published key. Node's own cryptography reads the JWK.
"use strict";

const { createPublicKey, verify } = require("node:crypto");
const { readFileSync } = require("node:fs");

const { jwk, signed, signature } = JSON.parse(readFileSync(0, "utf8"));
const key = createPublicKey({ key: jwk, format: "jwk" });
const isGenuine = verify(null, Buffer.from(signed, "base64"), key, Buffer.from(signature, "base64"));
process.stdout.write(JSON.stringify(isGenuine));
