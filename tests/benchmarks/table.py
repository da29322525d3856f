"""The one table: each figure beside its yardstick, the ratio with its spread, and whether it is good enough."""

from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass
class Rounds:
    """Pairs of figures, each pair taken in one round."""

    ours: list[float] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)

    def add(self, ours: float, yardstick: float) -> None:
        """Notes a round."""
        self.ours.append(ours)
        self.yardstick.append(yardstick)

    @property
    def ratios(self) -> list[float]:
        """Ours ÷ yardstick, round by round."""
        return [ours / other for ours, other in zip(self.ours, self.yardstick, strict=True)]


@dataclass
class Line:
    """One line of the table."""

    what: str
    ours: str
    yardstick: str
    result: str
    must: str
    aim: str
    reached: str


@dataclass
class Table:
    """Lines in the order in which they were measured, printed as they come."""

    lines: list[Line] = field(default_factory=list)

    def ratio(
        self,
        what: str,
        rounds: Rounds,
        unit: str,
        scale: float,
        *,
        must: float | None = None,
        aim: float | None = None,
        more: bool = False,
    ) -> None:
        """A ratio over several rounds; less is better unless `more`."""
        ratios = rounds.ratios
        self._add(
            what,
            f"{median(rounds.ours) * scale:.4g} {unit}",
            f"{median(rounds.yardstick) * scale:.4g} {unit}",
            f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            median(ratios),
            must,
            aim,
            more,
        )

    def one(
        self,
        what: str,
        ours: float,
        yardstick: float,
        unit: str,
        *,
        must: float | None = None,
        aim: float | None = None,
    ) -> None:
        """A ratio that was taken once."""
        self._add(
            what,
            f"{ours:.4g} {unit}",
            f"{yardstick:.4g} {unit}",
            f"{ours / yardstick:.2f}",
            ours / yardstick,
            must,
            aim,
        )

    def figure(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        must: float | None = None,
        aim: float | None = None,
        more: bool = True,
    ) -> None:
        """A figure that stands alone; more is better unless told otherwise."""
        self._add(what, f"{value:.4g} {unit}", "", "", value, must, aim, more)

    def _add(
        self,
        what: str,
        ours: str,
        yardstick: str,
        result: str,
        value: float,
        must: float | None,
        aim: float | None,
        more: bool = False,
    ) -> None:
        def meets(bound: float | None) -> bool:
            return bound is not None and (value >= bound if more else value <= bound)

        reached = "" if must is None else "aim" if meets(aim) else "must" if meets(must) else "NO"
        sign = "≥ " if more else "≤ "
        least, best = (sign + f"{bound:g}" if bound is not None else "" for bound in (must, aim))
        self.lines.append(Line(what, ours, yardstick, result, least, best, reached))
        print(f"  {what}: {ours} {yardstick and '÷ ' + yardstick} {result} {reached}", flush=True)

    def text(self) -> str:
        """The table in Markdown."""
        rows = [("what", "ours", "yardstick", "ratio: median (min–max)", "must", "aim", "reached")]
        rows += [tuple(asdict(line).values()) for line in self.lines]
        rows.insert(1, ("---",) * 7)
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
