"""Draw the losses of a run as a picture: `python examples/loss_curve.py outputs/RUN/metrics.jsonl curve.svg`.

The line is the loss of the steps that were logged, the dots are held-out losses.
"""

import argparse
import json
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 320, 56, 44, 28, 24
Points = list[tuple[float, float]]


def read(path: Path) -> tuple[Points, Points]:
    """(step, loss) while training, and of the held-out rows."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    losses, held_out = (
        [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in ("loss", "eval_loss")
    )
    return losses, held_out


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from `low` to `high`."""
    step = 10.0 ** (len(str(int(high - low))) - 1) if high - low >= 1 else 0.1
    while (high - low) / step > 9:
        step *= 2
    while (high - low) / step < 4:
        step /= 2
    first = -(-low // step)
    return [round((first + i) * step, 6) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def drawn(losses: Points, held_out: Points, title: str) -> str:
    points = losses + held_out
    last, low, high = (
        max(x for x, _ in points),
        min(y for _, y in points) * 0.95,
        max(y for _, y in points) * 1.02,
    )

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13">{title}</text>',
    ]
    for y in ticks(low, high):
        at = place(0, y)[1]
        parts.append(f'<path d="M{LEFT} {at}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{y:g}</text>')
    for x in ticks(0, last):
        at = place(x, low)[0]
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in losses))
    parts.append(f'<polyline points="{line}" fill="none" stroke="#4878a8" stroke-width="1.5"/>')
    for step, loss in held_out:
        x, y = place(step, loss)
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="#d1603d"/>')
        parts.append(f'<text x="{x}" y="{y - 9}" text-anchor="middle" fill="#d1603d">{loss:.3f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="loss while training (line), held out (dots)")
    arguments = parser.parse_args()
    arguments.picture.write_text(drawn(*read(arguments.metrics), arguments.title))


if __name__ == "__main__":
    main()
