"""The style sheet of the report: system fonts, light and dark, readable on a phone."""

from fewstep.eval.reports.columns import COSTS
from fewstep.eval.reports.plots import COLOURS

_LIGHT = """
  color-scheme: light; --ink: #1b1f24; --dim: #5b6672; --paper: #ffffff; --card: #f6f7f9; --line: #dde1e6;
  --bad: #b3261e; --warn: #8a5a00; --front: #e3f2e6;"""
_DARK = """
  color-scheme: dark; --ink: #e7e9ec; --dim: #9aa4b0; --paper: #14171b; --card: #1c2026; --line: #353b44;
  --bad: #ff8a80; --warn: #f0b84a; --front: #1d3a25;"""

_RULES = """
:root { --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1440px; padding: 2rem 1.25rem 4rem; font: 15px/1.5 var(--font); color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
header { display: flex; align-items: start; justify-content: space-between; gap: .5rem 1rem; }
h1 { font-size: 1.6rem; margin: 0; line-height: 1.2; min-width: 0; }
h4 { font-size: .95rem; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 0; padding-top: .8rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; max-width: 95ch; }
.found { font-size: 1.05rem; border-left: 4px solid #2f9e44; padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
.dim { color: var(--dim); font-size: .88rem; }
.failed { color: var(--bad); }
.note { color: var(--warn); }
code, pre { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
button.theme { flex: none; border: 1px solid var(--line); border-radius: 8px; padding: .15rem .7rem; font-size: .85rem; }
:focus-visible { outline: 2px solid #3b82f6; outline-offset: 2px; border-radius: 3px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.numbers { width: 100%; border-collapse: separate; border-spacing: 0; }
.numbers th, .numbers td { padding: 5px 10px; line-height: 22px; border-bottom: 1px solid var(--line); text-align: right; }
.numbers thead th { color: var(--dim); font-size: .85rem; vertical-align: bottom; white-space: nowrap; }
.numbers thead button { font-weight: 600; text-align: inherit; }
.numbers thead button::after { content: "↕"; opacity: .35; padding-left: .25em; }
.numbers [aria-sort=ascending] button::after { content: "↑"; opacity: 1; }
.numbers [aria-sort=descending] button::after { content: "↓"; opacity: 1; }
.numbers .text { text-align: left; }
.numbers td.text { font-size: .85rem; min-width: 10rem; }
.numbers tbody th { text-align: left; font-weight: 500; font-size: .9rem; white-space: nowrap; }
.numbers tbody th, .numbers thead th:first-child { position: sticky; left: 0; background: var(--paper); border-bottom: 0;
  box-shadow: inset 0 -1px var(--line); }
.numbers td { white-space: nowrap; }
.numbers wbr { display: none; }
.numbers td.text { white-space: normal; }
.numbers small { color: var(--dim); display: block; font-size: .75rem; font-weight: 400; line-height: 14px; }
.numbers td.front { background: var(--front); }
.numbers td.best { font-weight: 700; }
.swatch { vertical-align: -1px; flex: none; }
fieldset { border: 0; padding: 0; margin: .6rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
legend { float: left; color: var(--dim); padding: 0; }
fieldset label { cursor: pointer; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
.plots > div { background: var(--card); border-radius: 10px; padding: .8rem; max-width: 580px; }
.plots svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .6rem 0 1rem; font-size: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .5rem; }
.heats { display: flex; flex-wrap: wrap; gap: 1rem; }
.heats > div { background: var(--card); border-radius: 10px; padding: .8rem; max-width: 100%; }
.heat { margin: .4rem 0 0; }
.heat th { font-weight: 400; font-size: .75rem; color: var(--dim); padding: 0 .5rem 0 0; text-align: left; white-space: nowrap; }
.heat thead th { text-align: center; padding: 0; }
.heat td { min-width: .95rem; height: .95rem; padding: 0; border: 1px solid var(--card); background: var(--line);
  font-size: 0; }
.key { display: inline-block; width: .9em; height: .9em; border-radius: 2px; background: var(--line); }
.grid th, .grid td { padding: .3rem .4rem; vertical-align: top; text-align: left; }
.grid thead th { font-size: .85rem; color: var(--dim); font-weight: 600; }
.grid tr.name th { font-size: .9rem; padding-top: .9rem; padding-bottom: 0; }
.grid tr.name span { position: sticky; left: .4rem; }
.grid img { display: block; image-rendering: pixelated; border-radius: 4px; }
ol.prompts { columns: 16rem; padding-left: 2.2rem; margin: .4rem 0 1rem; font-size: .88rem; color: var(--dim); }
details { background: var(--card); border-radius: 10px; padding: .7rem 1rem; margin-top: 2.4rem; }
summary { cursor: pointer; font-weight: 600; }
details pre { overflow: auto; max-height: 40rem; }
@media (max-width: 600px) {
  body { padding: 1.2rem .9rem 3rem; }
  .numbers tbody th { white-space: normal; font-size: .8rem; line-height: 16px; }
  .numbers .swatch { display: block; }
  .numbers wbr { display: inline; }
  .numbers th, .numbers td { padding: 5px 6px; }
}
@media print { button.theme, fieldset { display: none; } .scroll { overflow: visible; } }
"""

# The plots against one cost are shown; without :has() all are.
_CHOSEN = "\n".join(
    f'.fronts:has(input[value="{cost.field}"]:checked) > .plots > :not([data-cost="{cost.field}"]) {{ display: none; }}'
    for cost in COSTS
)
_HEAT = "\n".join(f".heat .d{index + 1}, .key.d{index + 1} {{ background: {c}; }}" for index, c in enumerate(COLOURS))

CSS = (
    f":root {{{_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{{_DARK} }} }}\n"
    f":root[data-theme=dark] {{{_DARK} }}\n{_RULES}{_CHOSEN}\n{_HEAT}\n"
)
