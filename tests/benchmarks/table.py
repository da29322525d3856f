"""The result table: each figure beside its yardstick, the ratio with its spread, and whether the target is reached."""

from dataclasses import asdict, dataclass, field
from statistics import median


@dataclass
class Rounds:
    """Pairs of figures. Each pair was measured in one round."""

    ours: list[float] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)

    def add(self, ours: float, yardstick: float) -> None:
        """Add the figures of a round."""
        self.ours.append(ours)
        self.yardstick.append(yardstick)

    @property
    def ratios(self) -> list[float]:
        """Ours ÷ yardstick for each round."""
        return [ours / yardstick for ours, yardstick in zip(self.ours, self.yardstick, strict=True)]


@dataclass
class Row:
    """A row of the table."""

    name: str
    ours: str
    yardstick: str
    result: str
    must: str
    aim: str
    reached: str


@dataclass
class Table:
    """The rows in the order of measurement. Each row is printed when it is added."""

    rows: list[Row] = field(default_factory=list)

    def ratio(
        self,
        name: str,
        rounds: Rounds,
        unit: str,
        scale: float,
        *,
        must: float | None = None,
        aim: float | None = None,
        more: bool = False,
    ) -> None:
        """Add a ratio over several rounds. A lower value is better unless `more` is true."""
        ratios = rounds.ratios
        self._add(
            name,
            f"{median(rounds.ours) * scale:.4g} {unit}",
            f"{median(rounds.yardstick) * scale:.4g} {unit}",
            f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            median(ratios),
            must,
            aim,
            more,
        )

    def single(
        self,
        name: str,
        ours: float,
        yardstick: float,
        unit: str,
        *,
        must: float | None = None,
        aim: float | None = None,
    ) -> None:
        """Add a ratio that was measured once. A lower value is better."""
        self._add(
            name,
            f"{ours:.4g} {unit}",
            f"{yardstick:.4g} {unit}",
            f"{ours / yardstick:.2f}",
            ours / yardstick,
            must,
            aim,
        )

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        must: float | None = None,
        aim: float | None = None,
        more: bool = True,
    ) -> None:
        """Add a figure without a yardstick. A higher value is better unless `more` is false."""
        self._add(name, f"{value:.4g} {unit}", "", "", value, must, aim, more)

    def _add(
        self,
        name: str,
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
        must_text, aim_text = (sign + f"{bound:g}" if bound is not None else "" for bound in (must, aim))
        self.rows.append(Row(name, ours, yardstick, result, must_text, aim_text, reached))
        print(f"  {name}: {ours} {yardstick and '÷ ' + yardstick} {result} {reached}", flush=True)

    def text(self) -> str:
        """Return the table in Markdown."""
        cells = [("what", "ours", "yardstick", "ratio: median (min–max)", "must", "aim", "reached")]
        cells += [tuple(asdict(row).values()) for row in self.rows]
        cells.insert(1, ("---",) * 7)
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
