"""What a program found: figures to quote, and sentences that hold or do not."""

from collections.abc import Sized
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence of the acceptance, whether it held, and what was seen."""

    sentence: str
    held: bool
    seen: str


@dataclass(slots=True)
class Report:
    """The figures and checks of one program, in the order in which they were found."""

    name: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def figure(self, name: str, value: object) -> None:
        """Note a figure; decimals are cut to what matters."""
        self.figures.append((name, f"{value:.2f}" if isinstance(value, float) else str(value)))

    def check(self, sentence: str, held: bool, seen: object = "") -> None:
        """Note whether a sentence held."""
        self.checks.append(Check(sentence, held, str(seen)))

    def none_of(self, sentence: str, offenders: Sized, seen: object | None = None) -> None:
        """Note a sentence that holds when nothing speaks against it."""
        self.check(sentence, len(offenders) == 0, offenders if seen is None else seen)

    @property
    def passed(self) -> bool:
        """Whether there were checks and all of them held."""
        return bool(self.checks) and all(check.held for check in self.checks)

    def text(self) -> str:
        """The figures as a table, then one line per check."""
        width = max((len(name) for name, _ in self.figures), default=0)
        lines = [f"== {self.name}", *(f"   {name:<{width}}  {value}" for name, value in self.figures)]
        for check in self.checks:
            seen = f": {check.seen[:600]}" if check.seen and not check.held else ""
            lines.append(f"{'PASS' if check.held else 'FAIL'} {check.sentence}{seen}")
        return "\n".join(lines)


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies; nan for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
