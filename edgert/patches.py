"""When a set of adapters runs as patches of packed codes, and the patches of those used last."""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgert import _native
from edgert.errors import BudgetError, InvalidArgumentError

AdapterMode = Literal["auto", "patch", "overlay", "gated"]
MODES = ("auto", "patch", "overlay", "gated")
# Of what clamping costs (native/src/adapters/patch.h); beyond it sparse values are added to products instead.
MAX_LOSS = 0.25
_KEPT = 4  # sets

Mix = list[tuple[_native.Adapter, float]]


@dataclass(frozen=True)
class PatchEstimate:
    """Of one adapter at scale 1, sums of squares: of the values that a patch could carry, of what the weights there lack of the
    floats that they were made of, of what a patch would lose to clamping, and of all sparse values."""

    carried: float = 0.0
    beside: float = 0.0
    lost: float = 0.0
    sparse: float = 0.0


@dataclass(frozen=True)
class Decision:
    """`patches`: None where everything stays beside the weights; `why` then says why. `top_k`: how many adapters a token takes
    of a matrix, by their gates; 0: all."""

    patches: _native.Patches | None
    why: str = ""
    top_k: int = 0
    mix: tuple[
        tuple[_native.Adapter, float], ...
    ] = ()  # of patches that a file has; else of those that are on


class PatchSets:
    """The sets that were used last, so that going back to one compiles nothing. For one thread at a time."""

    def __init__(self) -> None:
        self._sets: OrderedDict[tuple[tuple[int, float], ...], tuple[Mix, _native.Patches]] = OrderedDict()

    def get(
        self,
        native: _native.Model,
        mix: Mix,
        make: Callable[[], _native.Patches],
        make_room: Callable[[], bool],
    ) -> _native.Patches:
        """Those of `mix`, or else what `make` makes. Raises BudgetError once make_room() gives nothing more."""
        key = _key(mix)
        if key not in self._sets:
            while len(self._sets) >= _KEPT:
                self._drop(native, next(iter(self._sets)))
            self._sets[key] = (mix, self._made(native, make, make_room))
        self._sets.move_to_end(key)
        return self._sets[key][1]

    def has(self, mix: Mix) -> bool:
        return _key(mix) in self._sets

    def _made(
        self, native: _native.Model, make: Callable[[], _native.Patches], make_room: Callable[[], bool]
    ) -> _native.Patches:
        while True:
            try:
                return make()
            except BudgetError:
                if not self.drop_oldest(native) and not make_room():
                    raise

    def drop_oldest(self, native: _native.Model, but: _native.Patches | None = None) -> bool:
        """The set that was used longest ago; False where there is none `but` that one."""
        for key, (_, patches) in self._sets.items():
            if patches is not but:
                self._drop(native, key)
                return True
        return False

    def forget(self, adapter: _native.Adapter) -> list[_native.Patches]:
        """The sets that it is in, to be removed from the weights: no longer kept."""
        keys = [key for key, (mix, _) in self._sets.items() if any(one is adapter for one, _ in mix)]
        return [self._sets.pop(key)[1] for key in keys]

    def clear(self) -> None:
        self._sets.clear()

    def _drop(self, native: _native.Model, key: tuple[tuple[int, float], ...]) -> None:
        native.remove_patches(self._sets.pop(key)[1])


def _key(mix: Mix) -> tuple[tuple[int, float], ...]:
    return tuple(
        sorted((id(adapter), scale) for adapter, scale in mix)
    )  # adapters live as long as their sets


def decide(
    native: _native.Model,
    sets: PatchSets,
    mix: Mix,
    estimates: Sequence[PatchEstimate],
    mode: AdapterMode,
    *,
    rescaled: bool,
    make_room: Callable[[], bool],
) -> Decision:
    """How `mix` is to run, if not beside the weights by wish. `rescaled`: the same adapters are on now, with other scales.

    Raises InvalidArgumentError and BudgetError where `mode` is "patch" and that cannot be.
    """
    if not any(estimate.sparse for estimate in estimates):
        return Decision(None)
    loss = expected_loss([scale for _, scale in mix], estimates)
    if loss is None:
        return _refused(mode, "no sparse values with remainders, in a format that takes patches")
    if mode == "auto" and rescaled and not sets.has(mix):  # a slider is moved: compiling would be for once
        return Decision(None, "its scale was changed")
    if mode == "auto" and loss > MAX_LOSS:
        return too_much(loss)
    try:
        patches = sets.get(native, mix, lambda: native.patches(mix), make_room)
    except BudgetError as failure:
        if mode == "patch":
            raise
        return Decision(None, str(failure))
    return Decision(patches) if patches.covered else _refused(mode, "no matrix takes patches")


def decide_stored(
    native: _native.Model,
    sets: PatchSets,
    adapter: _native.Adapter,
    make: Callable[[bool], _native.Patches],
    *,
    spare: Callable[[Callable[[], _native.Patches]], _native.Patches],
) -> Decision:
    """Patches that a file has. `make`: of them, those of experts to stay in memory once read, as experts do; or to be read
    every time, which takes little memory, for which `spare` finds the room. Raises BudgetError."""
    mix = ((adapter, 1.0),)
    if native.resident:
        with contextlib.suppress(BudgetError):
            return Decision(sets.get(native, list(mix), lambda: make(True), lambda: False), mix=mix)
    return Decision(sets.get(native, list(mix), lambda: spare(lambda: make(False)), lambda: False), mix=mix)


def _refused(mode: AdapterMode, why: str) -> Decision:
    if mode == "patch":
        raise InvalidArgumentError(
            f"mode: 'patch' is not possible: {why}; convert the adapter with --weights, or the base with --remainders"
        )
    return Decision(None, why)


def too_much(loss: float) -> Decision:
    return Decision(None, f"patches would lose {loss:.0%} to clamped codes, more than {MAX_LOSS:.0%}")


def expected_loss(scales: Sequence[float], estimates: Sequence[PatchEstimate]) -> float | None:
    """The share of what patches carry that clamping takes, as if it were the same at all scales; None where they carry
    nothing."""
    pairs = list(zip(scales, estimates, strict=True))
    intended = sum(scale**2 * estimate.carried for scale, estimate in pairs)
    lost = sum(scale**2 * estimate.lost for scale, estimate in pairs)
    beside = sum(estimate.beside for estimate in estimates)
    return math.sqrt(lost / (intended + beside)) if intended else None


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise InvalidArgumentError(f"mode: found {mode!r:.40}, allowed are {', '.join(MODES)}")


def same_adapters(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether they differ in their scales alone."""
    return one.keys() == other.keys() and dict(one) != dict(other)
