"""The style of the page: no fonts, pictures or scripts from anywhere; light or dark as the reader has it."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--raised:#f6f7f9;--ink:#1b1f24;--soft:#59636e;--rule:#dfe3e8;--accent:#2563b0;
--a:#2563b0;--b:#c2570c;--basis:#2563b0;--loadings:#2a9d8f;--verbatim:#d59a1c;--metadata:#8a94a0;--warn:#9a4a00}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--raised:#1c2026;--ink:#e6e9ed;--soft:#9aa5b1;--rule:#2d333b;
--accent:#6cabf5;--a:#6cabf5;--b:#f29a5b;--basis:#4f93e0;--loadings:#3bb3a4;--verbatim:#d9a83f;--metadata:#77828e;
--warn:#f0b072}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:break-word}
bdi,code,small,dd{overflow-wrap:anywhere}
main{max-width:1060px;margin:0 auto;padding:28px 18px 48px}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 .3rem;font-weight:650;letter-spacing:-.01em}
h2{font-size:1.08rem;margin:2.6rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--rule);font-weight:650}
h3{font-size:.92rem;margin:0 0 .4rem;font-weight:600}
p{margin:.4rem 0;max-width:72ch}
.soft,figcaption,footer,.key{color:var(--soft);font-size:.87rem}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:1px;margin:1.3rem 0 0;padding:0;
background:var(--rule);border:1px solid var(--rule);border-radius:8px;overflow:hidden}
.tiles div{background:var(--raised);padding:.7rem .85rem}
.tiles dt{color:var(--soft);font-size:.8rem}
.tiles dd{margin:0;font-size:1.3rem;font-weight:600;line-height:1.35}
.tiles small{display:block;font-size:.78rem;font-weight:400;color:var(--soft)}
.notes{margin:1rem 0 0;padding:.6rem .9rem .6rem 1.9rem;border-left:3px solid var(--warn);background:var(--raised)}
.notes li{margin:.2rem 0;max-width:80ch}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.4rem 2.2rem;align-items:start}
.three{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:1.2rem 1.6rem;margin:.6rem 0}
.two+.two,.three+.two{margin-top:1.6rem}
figure{margin:.5rem 0 0;min-width:0}
figcaption{margin-top:.35rem;max-width:72ch}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0}
.key i,td i{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em;background:currentColor}
.scroll{overflow-x:auto;margin-top:.6rem}
table{border-collapse:collapse;width:100%;font-size:.87rem}
th{color:var(--soft);font-weight:500;font-size:.8rem;white-space:nowrap}
th,td{text-align:left;padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
th:last-child,td:last-child{padding-right:0}
.n{text-align:right;white-space:nowrap}
td:first-child{min-width:6.5em}
.whole{white-space:nowrap}
td small{display:block;color:var(--soft);line-height:1.35}
.meter{display:inline-block;width:64px;height:.55em;margin-right:.6em;background:var(--rule);border-radius:2px}
.meter i{display:block;width:0;height:100%;margin:0;background:var(--accent)}
.facts{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.25rem 1.4rem;margin:.6rem 0;font-size:.9rem}
.facts dt{color:var(--soft)}
.facts dd{margin:0}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--soft);font-size:.87rem}
footer{margin-top:2.6rem;padding-top:.8rem;border-top:1px solid var(--rule)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft);font-family:inherit;unicode-bidi:isolate}
svg .of,svg .row,svg .strong{fill:var(--ink)}
svg .strong{font-weight:600}
svg path,svg line{fill:none;stroke-linecap:round;stroke-linejoin:round}
.base{stroke:var(--soft);stroke-width:1}
.grid{stroke:var(--rule);stroke-width:1}
.mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:2 3}
.bar,.cell{fill:var(--accent)}
.histogram .bar{fill-opacity:.8}
.orig{fill:var(--metadata);fill-opacity:.45}
.all{fill:var(--basis)}
.basis,.codes{fill:var(--basis);color:var(--basis)}
.loadings{fill:var(--loadings);color:var(--loadings)}
.verbatim{fill:var(--verbatim);color:var(--verbatim)}
.metadata{fill:var(--metadata);color:var(--metadata)}
.fan{stroke:var(--rule);stroke-width:1}
svg .band{fill:var(--accent);fill-opacity:.16;stroke:none}
.curve{stroke:var(--accent);stroke-width:1.6}
.point{fill:var(--accent)}
.dot circle{stroke:var(--bg);stroke-width:1.5}
.rms circle{fill:var(--b)}
.mean circle{fill:var(--ink)}
svg .range{stroke:none;fill-opacity:.18}
svg .range.A{fill:var(--a)}
svg .range.B{fill:var(--b)}
.line{stroke-width:2}
.line.A{stroke:var(--a)}
.line.B{stroke:var(--b)}
.A{color:var(--a)}
.B{color:var(--b)}
.c-rms{color:var(--b)}
.c-mean{color:var(--ink)}
.c-curve{color:var(--accent)}
svg .inner{font-size:10.5px;fill:var(--ink)}
@media(max-width:720px){
main{padding:18px 15px 36px}
h1{font-size:1.3rem}
.two,.three{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:1fr 1fr}
.tiles dd{font-size:1.12rem}
.tiles div:last-child:nth-child(odd){grid-column:span 2}
svg text{font-size:15px}
.spectrum text{font-size:10.5px}
svg .inner{display:none}
.facts{grid-template-columns:minmax(0,1fr);gap:0}
.facts dd{margin:0 0 .5rem}
.meter{width:44px}
th,td{padding-right:.6rem}
}
@media print{h2{break-after:avoid}figure,table{break-inside:avoid}}
"""
