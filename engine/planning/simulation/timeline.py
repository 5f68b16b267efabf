"""Draws a timeline as SVG: hTasks' microbatches over stages and time. Forward is pale, backward full."""

from collections.abc import Sequence
from html import escape

from engine.planning.simulation.pipeline_simulator import Timeline

_WIDTH, _ROW, _LEFT, _TOP = 1200.0, 34.0, 70.0, 46.0
_HUES = 137.5  # degrees from one hTask to the next: the golden angle, so that neighbours differ in color


def svg(timelines: Sequence[tuple[str, Timeline]]) -> str:
    """Draw titled timelines, one below another, on one scale of time. A tooltip describes each microbatch."""
    longest = max((timeline.seconds for _, timeline in timelines), default=0.0)
    body, top = list[str](), 0.0
    for title, timeline in timelines:
        body.append(f'<g transform="translate(0,{top:g})">{_draw(title, timeline, _WIDTH / (longest or 1.0))}</g>')
        top += _TOP + _ROW * timeline.pipeline.num_stages + 12
    size = f'width="{_LEFT + _WIDTH + 10:g}" height="{top:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(body)}</svg>\n'
    )


def _draw(title: str, timeline: Timeline, scale: float) -> str:
    names = sorted({o.scheduled.htask.name for o in timeline.operations})
    hues = {name: i * _HUES % 360 for i, name in enumerate(names)}
    heading = f"{title}: {timeline.seconds:.3g} s, bubbles {timeline.bubble_fraction:.1%}"
    parts = [f'<text x="8" y="20" font-size="14">{escape(heading)}</text>']
    for stage in range(timeline.pipeline.num_stages):
        y = _TOP + _ROW * stage
        parts.append(f'<text x="8" y="{y + 18:g}">stage {stage}</text>')
        parts.append(f'<rect x="{_LEFT:g}" y="{y:g}" width="{timeline.seconds * scale:.1f}" height="28" fill="#eee"/>')
    for o in timeline.operations:
        name, direction = o.scheduled.htask.name, "backward" if o.is_backward else "forward"
        tooltip = f"{name}, round {o.scheduled.round}, microbatch {o.scheduled.microbatch}, {direction}"
        parts.append(
            f'<rect x="{_LEFT + o.start_seconds * scale:.1f}" y="{_TOP + _ROW * o.stage:g}" height="28" '
            f'width="{max(0.5, (o.end_seconds - o.start_seconds) * scale - 0.5):.1f}" '
            f'fill="hsl({hues[name]:.0f} 60% {45 if o.is_backward else 72}%)">'
            f"<title>{escape(tooltip)}</title></rect>"
        )
    return "".join(parts)
