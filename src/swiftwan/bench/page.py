"""What a report's page looks like, and the few lines of script that keep its videos in step."""

STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #f4f5f7; --text: #1a1a1a; --back: #fff; --mute: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a3d42; --soft: #22252a; --text: #e8e8e8; --back: #16181c; --mute: #a5a8ad; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.1rem; }
h1, h2, .prompt, .note, li { overflow-wrap: anywhere; }
.prompt { color: var(--mute); font-style: italic; }
.conclusion { background: var(--soft); border-left: 4px solid #0072b2; padding: .8rem 1rem .8rem 2rem; }
figure { margin: 1.2rem 0; break-inside: avoid; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.note { color: var(--mute); font-size: .85rem; margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .45rem; text-align: right; white-space: nowrap; }
thead th { background: var(--soft); white-space: normal; vertical-align: bottom; }
.scroll th:first-child { position: sticky; left: 0; background: var(--back); }
.scroll thead th:first-child { background: var(--soft); }
th:first-child, td.reason { text-align: left; }
td.reason, .wrap td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
.wrap th { white-space: normal; text-align: left; vertical-align: top; }
td.reason { color: #b3261e; }
@media (prefers-color-scheme: dark) { td.reason { color: #ff8a80; } }
.charts, .pairs { display: grid; gap: 0 1.5rem; }
.charts, .pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); }
.pairs table { font-size: .8rem; } .pairs th, .pairs td { padding: .3rem .35rem; }
.chart { width: 100%; height: auto; } .chart text { fill: currentColor; font-size: 12px; }
.chart .grid { stroke: var(--line); } .mark { fill: var(--back); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: 0; font-size: .85rem; }
.videos { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 220px), 1fr)); }
.videos figure { margin: 0; } .videos figcaption { font-weight: 400; font-size: .85rem; overflow-wrap: anywhere; }
.videos video, .videos img { width: 100%; display: block; background: #000; }
.controls { display: flex; gap: .8rem; align-items: center; margin: .6rem 0; flex-wrap: wrap; }
.controls button { font: inherit; padding: .4rem 1.1rem; min-height: 44px; }
.controls input { flex: 1; min-width: 140px; min-height: 44px; }
@media (max-width: 600px) {
  th, td { padding: .3rem .35rem; } table { font-size: .78rem; } .chart text { font-size: 18px; }
  .scroll th:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 6.6rem; max-width: 7.5rem; }
  .videos { grid-template-columns: 1fr 1fr; gap: .6rem; }
}
@media print {
  :root { color-scheme: light; --line: #bbb; --soft: #eee; --text: #000; --back: #fff; --mute: #444; }
  main { max-width: none; padding: 0; } .controls { display: none; } .scroll { overflow: visible; }
  th { white-space: normal; } th, td { padding: .15rem .25rem; } table, .pairs table { font-size: 7pt; }
  .pairs { grid-template-columns: 1fr 1fr; } h2 { break-after: avoid; }
}
"""

CONTROLS = (
    "<div class='controls'><button type='button' data-play>Play</button>"
    "<input type='range' min='0' max='1000' value='0' data-seek aria-label='Position'>"
    "<label>Speed <select data-speed><option>0.25</option><option>0.5</option><option selected>1</option>"
    "</select></label></div>"
)

# The first video leads; the others follow when they are a frame or more away.
SCRIPT = """
document.querySelectorAll('.controls').forEach(controls => {
  const videos = [...controls.nextElementSibling.querySelectorAll('video')];
  if (!videos.length) { controls.remove(); return; }
  const lead = videos[0], play = controls.querySelector('[data-play]'), seek = controls.querySelector('[data-seek]');
  const speed = controls.querySelector('[data-speed]');
  const all = what => videos.forEach(what);
  play.onclick = () => {
    if (lead.paused) { all(v => { v.currentTime = lead.currentTime; v.play(); }); play.textContent = 'Pause'; }
    else { all(v => v.pause()); play.textContent = 'Play'; }
  };
  seek.oninput = () => all(v => { v.currentTime = seek.value / 1000 * (lead.duration || 0); });
  speed.onchange = () => all(v => { v.playbackRate = Number(speed.value); });
  lead.ontimeupdate = () => {
    seek.value = 1000 * lead.currentTime / (lead.duration || 1);
    if (lead.paused) return;
    all(v => { if (Math.abs(v.currentTime - lead.currentTime) > 0.06) v.currentTime = lead.currentTime; });
  };
});
"""
