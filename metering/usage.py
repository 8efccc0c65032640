"""What was used, in dimensions that do not overlap: each unit is in exactly one of them, and is priced once."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec


class Units(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Disjoint counts of one call. Cached tokens are not in `input_tokens`, reasoning tokens not in `output_tokens`.

    A correction holds differences, which may be negative.
    """

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    """Written to a cache that lasts minutes."""
    cache_write_1h_tokens: int = 0
    """Written to a cache that lasts an hour (Anthropic prices the two apart)."""
    input_audio_tokens: int = 0
    input_image_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    output_audio_tokens: int = 0
    output_image_tokens: int = 0
    images: int = 0
    """Pictures that are priced by the piece; those priced by tokens are not counted here."""
    audio_seconds: int = 0

    @property
    def all_input_tokens(self) -> int:
        """Every token that went in: what a provider calls the prompt, and what steps of a price go by."""
        return (
            self.input_tokens
            + self.cached_input_tokens
            + self.cache_write_tokens
            + self.cache_write_1h_tokens
            + self.input_audio_tokens
            + self.input_image_tokens
        )

    @property
    def all_output_tokens(self) -> int:
        """Every token that came out."""
        return self.output_tokens + self.reasoning_tokens + self.output_audio_tokens + self.output_image_tokens

    @property
    def all_tokens(self) -> int:
        """Every token: what a plan's allowance counts."""
        return self.all_input_tokens + self.all_output_tokens


class Media(NamedTuple):
    """What a call takes that no token counts, estimated before it has ended: what is known if it never does."""

    images: int
    audio_seconds: int


NO_MEDIA: Final = Media(0, 0)
UNIT_NAMES: Final[tuple[str, ...]] = Units.__struct_fields__
NO_UNITS: Final = Units()


def units_of_media(media: Media) -> Units:
    """Return pictures and seconds as units of a call."""
    return Units(images=media.images, audio_seconds=media.audio_seconds)
