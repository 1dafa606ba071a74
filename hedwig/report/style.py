"""The page's style sheet, as a string because the report is one file that may be sent by mail.

Typefaces are the reader's own. Colours are variables with a dark twin; pictures keep their light ground and lie on it
like prints. On paper the page drops its shadows and keeps a table's or figure's lines together.
"""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root{color-scheme:light dark;--ink:#1f2933;--muted:#5d6874;--faint:#e4e8ec;--page:#fbfbfa;--card:#fff;--blue:#0067a3;
--ours:#e9f3fa;--warn:#8a4b00;--warn-bg:#fff4e5;--bad:#a33b00;--good:#006b4d}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--muted:#9aa7b4;--faint:#2e3842;--page:#14191e;--card:#1b2229;
--blue:#6bb8ea;--ours:#1c3242;--warn:#ffc982;--warn-bg:#3a2a12;--bad:#ff9a66;--good:#5fd0a8}
figure img,.strip,.frames{filter:brightness(.93)}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main,header,footer{max-width:1360px;margin:0 auto;padding:0 28px}
header{padding-top:34px}
h1{font-size:1.9rem;line-height:1.2;margin:0;letter-spacing:-.015em;text-wrap:balance}
h2{font-size:1.22rem;margin:3.2rem 0 .7rem;letter-spacing:-.005em}
h3{font-size:1rem;margin:0}
p{margin:.4rem 0}
.quiet,figcaption,caption{color:var(--muted);font-size:.86rem}
.badge{display:inline-block;background:var(--warn-bg);color:var(--warn);border:1px solid currentColor;
border-radius:999px;font-size:.74rem;font-weight:600;padding:.05em .7em;vertical-align:.28em;letter-spacing:.01em}
caption .badge{vertical-align:baseline;margin-right:.2em}h3 .quiet{font-weight:400}
.verdict span{display:block;font-size:.92rem;color:var(--muted)}
.verdict{font-size:1.1rem;line-height:1.45;max-width:62em;margin:.8rem 0 .4rem;padding-left:.85rem;
border-left:4px solid var(--muted);text-wrap:pretty}
.verdict.good{border-color:var(--good)}.verdict.bad{border-color:var(--bad)}
.first{display:grid;grid-template-columns:minmax(0,1.42fr) minmax(0,1fr);gap:28px;align-items:start;margin-top:1.4rem}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:26px}
figure{margin:0}figure img{display:block;width:100%;height:auto;background:#fff;border:1px solid var(--faint);
border-radius:8px}
figcaption{margin-top:.45rem}
.wide{overflow-x:auto}.wide+.wide{margin-top:1.4rem}
table{border-collapse:collapse;width:100%;font-size:.88rem}
caption{text-align:left;padding-bottom:.5rem}
th,td{padding:.3rem .45rem;text-align:right;vertical-align:baseline;border-bottom:1px solid var(--faint)}
th:first-child,td:first-child{text-align:left;padding-left:.5rem}
td.text,th.text{text-align:left}
thead th{font-weight:600;color:var(--muted);white-space:nowrap;border-bottom:1.5px solid var(--muted)}
tbody th{font-weight:500;white-space:nowrap}
tbody th[scope=rowgroup]{color:var(--muted);font-size:.78rem;font-weight:600;padding-top:.85rem;
border-bottom-color:var(--muted)}
tr.ours>*{background:var(--ours)}tr.ours th,tr.ours td{font-weight:650}
tr.floor>*,tr.oracle>*{color:var(--muted)}
tr.bad>*{color:var(--bad);font-weight:600}
small{display:block;color:var(--muted);font-size:.76rem;font-weight:400;white-space:nowrap}
td{white-space:nowrap}td.text{white-space:normal}
.example{border-top:1px solid var(--faint);padding:1.1rem 0 1.3rem;display:grid;gap:6px 26px;
grid-template-columns:minmax(0,1.7fr) minmax(0,1fr);break-inside:avoid}
.example h3{grid-column:1/-1}
.strip{display:block;width:100%;height:auto;max-height:260px;object-fit:cover;border-radius:6px}
.frames{display:block;width:100%;height:auto;margin-top:6px;border-radius:4px}
.where{max-width:400px;margin:.6rem 0}.where b{color:#d55e00}.where i{color:#0072b2;font-style:normal}
.none{display:block;border:1px dashed var(--muted);border-radius:6px;padding:1.4rem;text-align:center;
color:var(--muted);font-size:.86rem}
.near{margin:0;padding:0;list-style:none;font-size:.82rem}
.near li{display:grid;grid-template-columns:110px 1fr;gap:10px;align-items:center;padding:3px 0}
.near .strip{max-height:44px;border-radius:4px}.near .none{padding:.5rem}
code,pre{font:.84em/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace}
pre{background:var(--card);border:1px solid var(--faint);border-radius:8px;padding:.8rem 1rem;overflow-x:auto;
white-space:pre-wrap}
details{margin:.6rem 0}summary{cursor:pointer;color:var(--blue);font-weight:500}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem 1.1rem;margin:.4rem 0;font-size:.9rem}
dt{color:var(--muted)}dd{margin:0}
footer{margin-top:3.5rem;padding-top:1rem;padding-bottom:3rem;border-top:1px solid var(--faint);
color:var(--muted);font-size:.84rem}
footer ul{padding-left:1.1rem;margin:.3rem 0}
@media (max-width:1240px){.first{grid-template-columns:minmax(0,1fr)}.first figure{max-width:900px}}
@media (max-width:1000px){.two,.example{grid-template-columns:minmax(0,1fr)}main,header,footer{padding:0 16px}
header{padding-top:22px}}
@media print{:root{--page:#fff;--card:#fff}body{font-size:10.5pt}main,header,footer{max-width:none;padding:0}
h2{break-after:avoid}figure,table,.example{break-inside:avoid}.first{grid-template-columns:1fr}
.wide{overflow:visible}details:not([open]){display:none}}
"""
