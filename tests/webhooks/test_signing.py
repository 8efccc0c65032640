"""Signatures and keys against the published vectors, and secrets as they are written and read."""

from __future__ import annotations

import hmac
import re
import traceback
from base64 import b64decode, b64encode, urlsafe_b64decode
from datetime import UTC, datetime

import pytest
import standardwebhooks
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from core.settings import SigningSeed
from webhooks.signing import PlatformKeys, new_secret, parse_secret, secret_text, sign

# Standard Webhooks: of its reference libraries' tests, which Svix's agree with.
EVENT_ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
TIMESTAMP = 1_614_265_330
BODY = b'{"test": 2432232314}'
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
SEED = SigningSeed(b64decode("VEVTVFNJR05JTkdLRVlET05PVFVTRVRISVNGT1JBTlk="))
PLATFORM_SIGNATURE = "v1a,tQ9V2XOqn7jL/DQenEFpqIugdBVtiMmER5mhSkXBNwM0mkATuDe6KYYUuxqtaiHeYGb7KaaBRdM5WqyeFiL8Ag=="
# RFC 8037, appendix A.1, A.2 and A.4.
RFC_SEED = SigningSeed(urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="))
RFC_X = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
RFC_SIGNED = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
RFC_SIGNATURE = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
NO_KEYS = PlatformKeys(())


def whsec(secret: bytes) -> str:
    return "whsec_" + b64encode(secret).decode()


def public_key(published: dict) -> Ed25519PublicKey:
    """The key as a receiver reads it, by RFC 8037: base64url without padding."""
    return Ed25519PublicKey.from_public_bytes(urlsafe_b64decode(published["x"] + "="))


class TestVectors:
    def test_a_secrets_signature_is_the_published_one(self) -> None:
        assert sign(EVENT_ID, TIMESTAMP, BODY, [parse_secret(SECRET)], NO_KEYS) == SIGNATURE

    def test_the_platforms_signature_is_the_published_one(self) -> None:
        assert sign(EVENT_ID, TIMESTAMP, BODY, [], PlatformKeys([SEED])) == PLATFORM_SIGNATURE

    def test_both_stand_in_one_header(self) -> None:
        header = sign(EVENT_ID, TIMESTAMP, BODY, [parse_secret(SECRET)], PlatformKeys([SEED]))
        assert header == f"{SIGNATURE} {PLATFORM_SIGNATURE}"

    def test_the_rfcs_key_is_published_as_the_rfc_has_it(self) -> None:
        (key,) = PlatformKeys([RFC_SEED]).published()
        assert (key["kty"], key["crv"], key["x"]) == ("OKP", "Ed25519", RFC_X)

    def test_the_rfcs_signature_is_made(self) -> None:
        (signature,) = PlatformKeys([RFC_SEED]).signatures(RFC_SIGNED)
        assert b64decode(signature.removeprefix("v1a,")) == urlsafe_b64decode(RFC_SIGNATURE + "==")


class TestSigning:
    def test_every_secret_and_every_key_gives_one_signature_in_order(self) -> None:
        """Guarantee: a receiver that knows any one of them finds its signature, newest secret first."""
        secrets, seeds = [new_secret(), new_secret(), new_secret()], [SEED, RFC_SEED]
        header = sign(EVENT_ID, TIMESTAMP, BODY, secrets, PlatformKeys(seeds))
        alone = [sign(EVENT_ID, TIMESTAMP, BODY, [secret], NO_KEYS) for secret in secrets]
        alone += [sign(EVENT_ID, TIMESTAMP, BODY, [], PlatformKeys([seed])) for seed in seeds]
        assert header.split(" ") == alone
        assert len(set(alone)) == 5

    @given(secret=st.binary(min_size=24, max_size=64), timestamp=st.integers(0, 4_000_000_000), body=st.text())
    def test_it_signs_as_the_reference_library_does(self, secret: bytes, timestamp: int, body: str) -> None:
        theirs = standardwebhooks.Webhook(secret).sign(EVENT_ID, datetime.fromtimestamp(timestamp, UTC), body)
        assert sign(EVENT_ID, timestamp, body.encode(), [secret], NO_KEYS) == theirs

    def test_a_body_is_signed_byte_for_byte(self) -> None:
        """Guarantee: bytes that are no text are signed as they are."""
        body, secret = b'{"a":"\xff\x00"}\r\n', new_secret()
        digest = hmac.digest(secret, b"evt_1.7." + body, "sha256")
        assert sign("evt_1", 7, body, [secret], NO_KEYS) == "v1," + b64encode(digest).decode()


class TestPublishedKeys:
    def test_what_was_signed_is_verified_with_what_is_published(self) -> None:
        keys = PlatformKeys([SEED, RFC_SEED])
        signatures = [b64decode(part.removeprefix("v1a,")) for part in keys.signatures(b"signed")]
        one, other = (public_key(published) for published in keys.published())
        one.verify(signatures[0], b"signed")
        other.verify(signatures[1], b"signed")
        for key, signature, signed in ((one, signatures[1], b"signed"), (one, signatures[0], b"changed")):
            with pytest.raises(InvalidSignature):
                key.verify(signature, signed)

    def test_the_key_is_published_in_the_form_of_standard_webhooks_too(self) -> None:
        for published in PlatformKeys([SEED, RFC_SEED]).published():
            assert published["webhook_key"].startswith("whpk_")
            raw = b64decode(published["webhook_key"].removeprefix("whpk_"), validate=True)
            assert raw == public_key(published).public_bytes_raw()

    def test_nothing_private_is_published(self) -> None:
        (published,) = PlatformKeys([RFC_SEED]).published()
        assert published.keys() == {"kty", "crv", "use", "alg", "kid", "x", "webhook_key"}
        assert (published["use"], published["alg"]) == ("sig", "EdDSA")

    def test_a_key_keeps_its_id_whatever_stands_beside_it(self) -> None:
        """Guarantee: a receiver that keeps keys by `kid` finds the same one after another was added."""
        (alone,) = PlatformKeys([SEED]).published()
        first, second = PlatformKeys([RFC_SEED, SEED]).published()
        assert second == alone
        assert first["kid"] != second["kid"]


class TestSecrets:
    def test_a_fresh_one_is_256_bits_that_nobody_has_seen(self) -> None:
        made = {new_secret() for _ in range(8)}
        assert {len(secret) for secret in made} == {32}
        assert len(made) == 8

    def test_the_published_one_is_read_and_written(self) -> None:
        assert secret_text(parse_secret(SECRET)) == SECRET

    @given(secret=st.binary(min_size=24, max_size=64))
    def test_what_is_written_is_read_again(self, secret: bytes) -> None:
        assert re.fullmatch(r"whsec_[A-Za-z0-9+/]+={0,2}", secret_text(secret))
        assert parse_secret(secret_text(secret)) == secret

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("", id="nothing"),
            pytest.param("whsec_", id="the prefix alone"),
            pytest.param(whsec(b"x" * 23), id="a byte too short"),
            pytest.param(whsec(b"x" * 65), id="a byte too long"),
            pytest.param(SECRET.removeprefix("whsec_"), id="no prefix"),
            pytest.param(SECRET.upper(), id="prefix in capitals"),
            pytest.param(SECRET.replace("whsec_", "whsk_"), id="the prefix of a private key"),
            pytest.param(f" {SECRET}", id="a space before it"),
            pytest.param(f"{SECRET}\n", id="a line's end after it"),
            pytest.param(f"{SECRET[:20]} {SECRET[20:]}", id="a space in it"),
            pytest.param(whsec(b"x" * 32).rstrip("="), id="padding left out"),
            pytest.param("whsec_" + "_-" * 16, id="base64url"),
            pytest.param("whsec_" + "ü" * 32, id="not ASCII"),
        ],
    )
    def test_another_text_is_refused_and_not_repeated(self, text: str) -> None:
        """Guarantee: a secret with a typing error is in no message, and in no traceback by way of a cause."""
        with pytest.raises(ValueError, match=r"^expected whsec_ and 24 to 64 bytes in base64$") as caught:
            parse_secret(text)
        told = "".join(traceback.format_exception(caught.value))
        typed = text.strip().removeprefix("whsec_")
        assert not typed or typed not in told
        assert caught.value.__cause__ is caught.value.__context__ is None
