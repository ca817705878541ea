"""The style sheet of the report: system fonts, light and dark, readable on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --ink: #1b1f24; --dim: #5b6672; --paper: #ffffff; --card: #f6f7f9; --line: #dde1e6;
  --bad: #b3261e; --warn: #8a5a00; --best: #e3f2e6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e7e9ec; --dim: #9aa4b0; --paper: #14171b; --card: #1c2026; --line: #353b44;
    --bad: #ff8a80; --warn: #f0b84a; --best: #1d3a25;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; font: 15px/1.5 var(--font); color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; margin: 0 0 .4rem; line-height: 1.2; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; max-width: 95ch; }
.dim { color: var(--dim); font-size: .88rem; }
.failed { color: var(--bad); }
.note { color: var(--warn); }
code, pre { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.numbers { width: 100%; }
.numbers th, .numbers td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
.numbers th { font-weight: 600; color: var(--dim); font-size: .85rem; vertical-align: bottom; white-space: nowrap; }
.numbers th.text, .numbers td.text { text-align: left; }
.numbers th:first-child, .numbers td:first-child { width: 4.5rem; }
.numbers tr.group th { text-align: left; color: var(--ink); font-size: .95rem; padding-top: .9rem;
  border-bottom: 2px solid var(--line); }
.swatch { vertical-align: -1px; }
.numbers .text { font-size: .85rem; min-width: 10rem; }
td.best { background: var(--best); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
.plots > div { background: var(--card); border-radius: 10px; padding: .8rem; }
.plots svg { width: 100%; height: auto; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .6rem 0 1rem; font-size: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .5rem; }
.grid th, .grid td { padding: .3rem .4rem; vertical-align: top; text-align: left; }
.grid thead th { font-size: .85rem; color: var(--dim); font-weight: 600; }
.grid tr.name th { font-weight: 600; font-size: .9rem; padding-top: .9rem; padding-bottom: 0; }
.grid img { display: block; image-rendering: pixelated; border-radius: 4px; }
ol.prompts { columns: 16rem; padding-left: 2.2rem; margin: .4rem 0 1rem; font-size: .88rem; color: var(--dim); }
details { background: var(--card); border-radius: 10px; padding: .7rem 1rem; margin-top: 2.4rem; }
summary { cursor: pointer; font-weight: 600; }
details pre { overflow-x: auto; max-height: 40rem; }
"""
