"""Cache strategies: the layers that keep a key/value cache at inference.

A strategy S always holds layer 0. Layer l reads mu(l) = max{j in S : j <= l} (paper, section 3).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from skvr_dist.errors import UserError

_KINDS = ("every", "even", "prefix", "suffix", "sandwich")
"""Strategies that take a number."""
_SPEC_HELP = "use full, every:G, even:M, prefix:M, suffix:M, sandwich:M, a list such as 0,4,8, or a named profile"


def layer_numbers(given: Any) -> tuple[int, ...]:
    """Layers as plain numbers, from any sequence of whole ones: lists, ranges, tensors, numpy arrays.

    Raises:
        UserError: it is none.
    """
    try:
        numbers = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(numbers, str | bytes) or any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return tuple(operator.index(number) for number in numbers)
    except TypeError:
        raise UserError(f"{given!r} does not list layers; give their numbers, such as [0, 4, 8]") from None


@dataclass(frozen=True)
class CacheStrategy:
    """The retained layers of a decoder with `num_layers` layers.

    Raises:
        UserError: layer 0 is missing, or a layer is repeated or out of range.
    """

    num_layers: int
    retained: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "retained", layer_numbers(self.retained))
        if list(self.retained) != sorted(set(self.retained)):
            raise UserError(f"cache strategy {list(self.retained)} must list its layers once each, ascending")
        if not self.retained or self.retained[0] != 0:
            raise UserError(
                f"cache strategy {list(self.retained)} does not retain layer 0, which every layer below the "
                f"next retained one reads; add 0"
            )
        if self.retained[-1] >= self.num_layers:
            raise UserError(
                f"cache strategy retains layer {self.retained[-1]}, but the model has layers 0 to {self.num_layers - 1}"
            )

    @classmethod
    def full(cls, num_layers: int) -> CacheStrategy:
        """Every layer keeps its cache: the standard decoder."""
        return cls(num_layers, tuple(range(num_layers)))

    @classmethod
    def every(cls, group: int, num_layers: int) -> CacheStrategy:
        """Every `group`-th layer, the usual choice of the paper."""
        if group < 1:
            raise UserError(f"cache strategy every:{group} needs a group of at least 1 layer")
        return cls(num_layers, tuple(range(0, num_layers, group)))

    @classmethod
    def even(cls, count: int, num_layers: int) -> CacheStrategy:
        """`count` layers at equal distances from 0 on: `every` where they divide the layers."""
        cls._require_count("even", count, num_layers)
        return cls(num_layers, tuple(number * num_layers // count for number in range(count)))

    @classmethod
    def prefix(cls, count: int, num_layers: int) -> CacheStrategy:
        """The first `count` layers; everything above reads the last of them."""
        cls._require_count("prefix", count, num_layers)
        return cls(num_layers, tuple(range(count)))

    @classmethod
    def suffix(cls, count: int, num_layers: int) -> CacheStrategy:
        """Layer 0 and the last `count` - 1; what lies between reads layer 0."""
        cls._require_count("suffix", count, num_layers)
        return cls(num_layers, (0, *range(num_layers - count + 1, num_layers)))

    @classmethod
    def sandwich(cls, count: int, num_layers: int) -> CacheStrategy:
        """`count` layers, half of them the first ones (rounded up), half the last ones."""
        cls._require_count("sandwich", count, num_layers)
        return cls(num_layers, (*range(-(-count // 2)), *range(num_layers - count // 2, num_layers)))

    @staticmethod
    def _require_count(kind: str, count: int, num_layers: int) -> None:
        if not 1 <= count <= num_layers:
            raise UserError(f"cache strategy {kind}:{count} is outside 1 to {num_layers} (the model's layers)")

    @classmethod
    def parse(cls, spec: str, num_layers: int, profiles: Mapping[str, str] | None = None) -> CacheStrategy:
        """Read `full`, `every:G`, `even:M`, `prefix:M`, `suffix:M`, `sandwich:M`, `0,4,8`, or a name among `profiles`.

        Raises:
            UserError: the text is none of these, or the strategy is impossible for this many layers.
        """
        if profiles and spec in profiles:
            return cls.parse(profiles[spec], num_layers)
        if spec == "full":
            return cls.full(num_layers)
        kind, _, argument = spec.partition(":")
        try:
            if kind in _KINDS:
                return getattr(cls, kind)(int(argument), num_layers)
            layers = tuple(int(part) for part in spec.split(","))
        except UserError:
            raise
        except ValueError:
            known = f" ({', '.join(profiles)})" if profiles else ""
            raise UserError(f"cannot read cache strategy {spec!r}; {_SPEC_HELP}{known}") from None
        return cls(num_layers, layers)

    @staticmethod
    def is_spec(text: str) -> bool:
        """Whether a text says by itself which layers it means, so that it can name nothing else."""
        return re.fullmatch(rf"full|({'|'.join(_KINDS)}):.*|[\d, ]+", text) is not None

    @classmethod
    def parse_all(
        cls, specs: Iterable[str], num_layers: int, profiles: Mapping[str, str] | None = None
    ) -> dict[str, CacheStrategy]:
        """Parse several strategies; returns them by the texts that the user gave."""
        return {spec: cls.parse(spec, num_layers, profiles) for spec in specs}

    @property
    def kv_source_layers(self) -> tuple[int, ...]:
        """mu as a list: the layer that each layer reads (transformers' name for such a map)."""
        sources, last = [], 0
        kept = set(self.retained)
        for layer in range(self.num_layers):
            last = layer if layer in kept else last
            sources.append(last)
        return tuple(sources)

    @property
    def retention(self) -> float:
        """|S| / L."""
        return len(self.retained) / self.num_layers

    def cache_bytes_per_token(self, *, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
        """|S| * 2 * kv_heads * head_dim * bytes_per_element."""
        return len(self.retained) * 2 * kv_heads * head_dim * bytes_per_element
