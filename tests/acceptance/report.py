"""The report of an acceptance program: measured figures, and checks that pass or fail."""

from collections.abc import Sized
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ReportCheck:
    """A checked sentence, whether it is true, and details for a failure."""

    sentence: str
    passed: bool
    detail: str


@dataclass(slots=True)
class Report:
    """The figures and checks of one program, in order."""

    name: str
    figures: list[tuple[str, str]] = field(default_factory=list)
    checks: list[ReportCheck] = field(default_factory=list)

    def figure(self, name: str, value: object) -> None:
        """Add a figure. Floats are rounded to two decimals."""
        self.figures.append((name, f"{value:.2f}" if isinstance(value, float) else str(value)))

    def check(self, sentence: str, passed: bool, detail: object = "") -> None:
        """Add a check."""
        self.checks.append(ReportCheck(sentence, passed, str(detail)))

    def none_of(self, sentence: str, offenders: Sized, detail: object | None = None) -> None:
        """Add a check that passes if `offenders` is empty."""
        self.check(sentence, len(offenders) == 0, offenders if detail is None else detail)

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def text(self) -> str:
        """Return the figures as a table, followed by one line per check."""
        width = max((len(name) for name, _ in self.figures), default=0)
        lines = [f"== {self.name}", *(f"   {name:<{width}}  {value}" for name, value in self.figures)]
        for check in self.checks:
            detail = f": {check.detail[:600]}" if check.detail and not check.passed else ""
            lines.append(f"{'PASS' if check.passed else 'FAIL'} {check.sentence}{detail}")
        return "\n".join(lines)


def quantile(values: list[float], share: float) -> float:
    """Return the quantile of the values at `share`, or NaN if there are no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
