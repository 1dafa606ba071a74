// The page: files in, one question to the service, the answer drawn. `body[data-state]` is empty, ready, busy, done or
// error. Nothing is kept between visits.

import * as api from "./api.js";
import { byId, make } from "./dom.js";
import { drawLists } from "./lists.js";
import { WorldMap } from "./map.js";
import { check, preview } from "./photograph.js";
import { drawStrip } from "./strip.js";
import { Viewer } from "./viewer.js";
import { bytes, errorTitle, percent, sentence } from "./words.js";

const limits = { max_body_bytes: 25 * 2 ** 20, max_batch: 16 };
const map = new WorldMap();
const viewer = new Viewer();
let files = [], picture = null, asked = null, running = null, again = null, served = null, shown = null;

function become(state) {
  document.body.dataset.state = state;
  byId("busy").hidden = state !== "busy";
  byId("error").hidden = state !== "error";
  showSend();
  byId("form").setAttribute("aria-busy", String(state === "busy"));
}

// After an answer only who changes an option has a use for the button.
function showSend() {
  const { state } = document.body.dataset;
  byId("send").hidden = files.length === 0 || state === "busy" || (state !== "ready" && !byId("options").open);
  byId("send").className = state === "ready" ? "main" : "";
  byId("send").textContent = state === "ready" ? "Locate" : "Locate again";
}

// What is served, and its cells; without them the page still works, with plainer words.
async function loadServed() {
  try {
    const told = await api.info();
    Object.assign(limits, { max_body_bytes: told.limits?.max_body_bytes ?? limits.max_body_bytes, max_batch: Math.min(16, told.limits?.max_batch ?? 16) });
    byId("most").textContent = bytes(limits.max_body_bytes);
    const counts = [told.num_references && `${told.num_references.toLocaleString("en")} reference panoramas`, told.num_cells && `${told.num_cells.toLocaleString("en")} geocells`];
    byId("served").textContent = counts.filter(Boolean).join(" in ");
    await loadCells(told.run_digest ?? null);
  } catch (error) {
    if (error.status === 401) showKey(error);
    else if (error.code !== "no_cells") sayMap(`${error.message} The map shows no cells.`);
  }
}

async function loadCells(digest) {
  served = digest;
  map.drawCells(await api.cells());
  byId("map-words").hidden = true;
  if (shown) tell(shown); // it came first, and named its cells by number
}

function sayMap(text) {
  byId("map-words").textContent = text;
  byId("map-words").hidden = false;
}

function showKey(error) {
  byId("key-box").hidden = false;
  byId("key-hint").textContent = `${error.code === "no_key" ? "This service asks for one." : error.message} It is kept until you close this page, and nowhere else.`;
}

// Files

async function choose(chosen) {
  if (!chosen.length) return;
  running?.abort();
  clearAnswer();
  files = [];
  again = null;
  try {
    await check(chosen, limits);
  } catch (error) {
    showError(error);
    return;
  }
  files = chosen;
  listSeveral();
  picture = await preview(files, headings());
  showPicture();
  byId("strip").setAttribute("aria-label", files.length === 1 ? `Your picture, ${files[0].name}` : `Your ${files.length} photographs side by side`);
  if (files.length === 1) await locate();
  else become("ready");
}

function listSeveral() {
  const many = files.length > 1;
  byId("several").hidden = !many;
  byId("heading-field").hidden = many;
  byId("headings").replaceChildren(...(many ? files : []).map((file, i) => {
    const input = make("input", { type: "number", id: `heading-${i}`, min: -360, max: 360, step: "any", value: String(Math.round(10 * i * 360 / files.length) / 10) });
    input.addEventListener("change", async () => { picture = await preview(files, headings()); showPicture(); });
    return make("li", {}, make("label", { for: input.id, textContent: file.name }), input, make("span", { textContent: "°" }));
  }));
}

const numberIn = (input) => (input.value.trim() === "" || !input.checkValidity() ? null : input.valueAsNumber);

function headings() {
  const inputs = [...byId("headings").querySelectorAll("input")].map(numberIn);
  return inputs.length && !inputs.includes(null) ? inputs : null;
}

function showPicture(frames = []) {
  byId("picture").hidden = picture === null;
  byId("viewer-open").hidden = true;
  byId("viewer-box").hidden = true;
  byId("viewer-open").setAttribute("aria-expanded", "false");
  byId("viewer-open").textContent = "Look around";
  if (!picture) return;
  const around = files.length === 1 && Viewer.fits(picture);
  drawStrip(picture, frames, around);
  byId("viewer-open").hidden = !around;
  const explained = frames.length > 0 && frames.every((frame) => frame.weight !== null);
  byId("strip-words").textContent = !frames.length ? ""
    : explained ? `What the model saw, in ${frames.length} frames. The bright parts and the full bars decided.`
      : `What the model saw, in ${frames.length} frames.`;
}

// The question and its answer

async function locate() {
  const stop = new AbortController(), began = performance.now();
  running?.abort();
  running = stop;
  clearAnswer();
  become("busy");
  byId("busy-text").textContent = "Sending the picture and looking …";
  byId("status").setAttribute("aria-busy", "true");
  const tick = setInterval(() => { byId("busy-time").textContent = `${Math.round((performance.now() - began) / 1000)} s`; }, 1000);
  try {
    asked = { files, headings: headings(), heading: numberIn(byId("heading")), topK: numberIn(byId("top-k")) ?? 5, explain: byId("explain").checked };
    const answer = await api.locate(asked, { signal: stop.signal });
    if (answer.run_digest !== served && served !== null) await loadCells(answer.run_digest).catch(() => {}); // moved to another run
    byId("key-box").hidden = true;
    show(answer);
  } catch (error) {
    if (stop !== running) return; // another question has taken its place
    if (error.name === "AbortError") {
      become("ready");
      byId("second").textContent = "Cancelled.";
      byId("send").focus();
    } else showError(error, locate);
  } finally {
    clearInterval(tick);
    byId("busy-time").textContent = "";
    byId("status").removeAttribute("aria-busy");
    if (stop === running) running = null;
  }
}

function clearAnswer() {
  clearInterval(again);
  shown = null;
  for (const id of ["sentence", "second"]) byId(id).textContent = "";
  byId("error").replaceChildren();
  for (const id of ["numbers", "evidence", "scale"]) byId(id).hidden = true;
  map.clear();
  if (picture) showPicture();
}

function show(answer) {
  become("done");
  shown = answer;
  showPicture(answer.frames ?? []);
  tell(answer);
  map.show(answer);
  byId("scale").hidden = !(answer.cell_ids.length > 0);
  byId("scale-high").textContent = percent(map.most);
}

// The answer in words, in which cells and countries have names where the map knows them.
function tell(answer) {
  const words = sentence(answer, map);
  byId("sentence").textContent = words.first;
  byId("second").textContent = words.second;
  drawLists(answer, map);
  byId("map").setAttribute("aria-label", `Map of the answer${words.first ? `: ${words.first}` : ""} Arrow keys move it, plus and minus zoom.`);
}

function showError(error, retry = null) {
  const known = error instanceof api.Refused;
  const { code, message, next, waitS, status } = known ? error : { code: "page", message: "The page itself failed.", next: "Reload it.", waitS: 0, status: 0 };
  if (!known) console.error(error);
  // What is wrong with the file stays wrong with it.
  const other = !retry || (status >= 400 && status < 500 && ![401, 403, 408, 429].includes(status));
  const button = make("button", { type: "button", textContent: other ? "Choose another file" : "Try again" });
  button.addEventListener("click", () => (other ? byId("file").click() : retry()));
  if (other) byId("picture").hidden = true;
  map.home();
  byId("error").replaceChildren(make("h3", { textContent: errorTitle(code) }), make("p", { textContent: message }), make("p", { textContent: next }),
    button, make("p", {}, make("code", { textContent: status ? `${code}, ${status}` : code })));
  become("error");
  if (status === 401) { showKey(error); byId("key").focus(); }
  if (!other && waitS > 0) countDown(button, Math.ceil(waitS));
}

function countDown(button, seconds) {
  const say = () => { button.disabled = seconds > 0; button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again"; };
  say();
  clearInterval(again);
  again = setInterval(() => { seconds -= 1; say(); if (seconds <= 0) clearInterval(again); }, 1000);
}

async function save(format, name) {
  if (!asked) return;
  byId("save-words").textContent = "The service is asked once more …";
  try {
    const url = URL.createObjectURL(await api.locate(asked, { format }));
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    byId("save-words").textContent = `${name} is in your downloads.`;
  } catch (error) {
    byId("save-words").textContent = `${error.message} ${error.next ?? ""}`;
  }
}

// Wiring

byId("file").addEventListener("change", (event) => { choose([...event.target.files]); event.target.value = ""; });
byId("form").addEventListener("submit", (event) => { event.preventDefault(); if (files.length) locate(); });
byId("options").addEventListener("toggle", showSend);
byId("cancel").addEventListener("click", () => running?.abort());
byId("key-use").addEventListener("click", async () => {
  api.useKey(byId("key").value);
  byId("key").value = "";
  byId("key-box").hidden = true;
  await loadServed();
  if (files.length && byId("key-box").hidden) locate();
});
byId("key").addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); byId("key-use").click(); } });
byId("save-geojson").addEventListener("click", () => save("geojson", "hedwig.geojson"));
byId("save-csv").addEventListener("click", () => save("csv", "hedwig.csv"));
for (const name of ["cells", "neighbours", "rings"]) byId(`show-${name}`).addEventListener("change", (event) => map.layerShown(name, event.target.checked));
byId("show-heat").addEventListener("change", (event) => map.heatShown(event.target.checked));
byId("viewer-open").addEventListener("click", (event) => {
  const open = byId("viewer-box").hidden;
  byId("viewer-box").hidden = !open;
  event.currentTarget.setAttribute("aria-expanded", String(open));
  event.currentTarget.textContent = open ? "Close the view" : "Look around";
  if (open) { viewer.show(picture, asked?.heading ?? null); byId("viewer").focus({ preventScroll: true }); }
});

let depth = 0; // dragenter and dragleave also come from what is inside
addEventListener("dragenter", () => { depth += 1; document.body.classList.add("over"); });
addEventListener("dragleave", () => { depth = Math.max(0, depth - 1); if (!depth) document.body.classList.remove("over"); });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  choose([...(event.dataTransfer?.files ?? [])]);
});
addEventListener("paste", (event) => choose([...(event.clipboardData?.files ?? [])]));

become("empty");
const landDrawn = api.land().then((outlines) => {
  map.drawLand(outlines);
  if (shown) tell(shown);
}).catch((error) => sayMap(`${error.message} The map shows no outlines.`));
await Promise.allSettled([landDrawn, loadServed()]);
document.body.dataset.loaded = "true";
