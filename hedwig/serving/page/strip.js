// The strip: the picture, darkened where the model took little from it, and below it a bar for each frame, in lanes so
// that overlapping windows stay apart. A frame that goes around the right edge is a bar in two pieces.

import { byId, make } from "./dom.js";
import { percent } from "./words.js";

const SHOWN_PX = 1600;
const LANE_PX = 26;

export function drawStrip(picture, frames, around) {
  const canvas = byId("strip"), scale = Math.min(1, SHOWN_PX / picture.width);
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  if (frames.length && frames.every((frame) => frame.weight !== null)) shade(context, canvas, frames);
  // All around: the horizon is enough. Else the whole picture, no higher than a strip.
  byId("strip-wrap").className = around ? "around" : "";
  byId("strip-wrap").style.maxWidth = around ? "" : `${Math.round(260 * picture.width / picture.height)}px`;
  drawLanes(frames);
}

// Light is the mean weight of the frames that see a column, against the heaviest column.
function shade(context, { width, height }, frames) {
  const light = new Float32Array(width);
  for (let x = 0; x < width; x++) {
    const seeing = frames.filter((frame) => covers(frame, (x + 0.5) / width));
    light[x] = seeing.reduce((sum, frame) => sum + frame.weight, 0) / Math.max(1, seeing.length);
  }
  const most = light.reduce((a, b) => Math.max(a, b), 1e-9);
  for (let x = 0; x < width; x++) {
    context.fillStyle = `rgba(13, 28, 34, ${(0.6 * (1 - light[x] / most)).toFixed(3)})`;
    context.fillRect(x, 0, 1, height);
  }
}

const covers = ({ x0, x1 }, x) => (x >= x0 && x < x1) || x + 1 < x1;

function pieces({ x0, x1 }) {
  return x1 > 1 + 1e-6 && x1 - x0 < 1 ? [[x0, 1], [0, x1 - 1]] : [[x0, Math.min(1, x1)]];
}

function drawLanes(frames) {
  const box = byId("lanes"), lanes = [];
  box.replaceChildren();
  const most = Math.max(...frames.map((frame) => frame.weight ?? 0), 1e-9);
  frames.forEach((frame, i) => {
    const parts = pieces(frame);
    const free = (taken) => parts.every(([a, b]) => taken.every(([c, d]) => b <= c + 1e-6 || a >= d - 1e-6));
    let lane = lanes.findIndex(free);
    if (lane < 0) lane = lanes.push([]) - 1;
    lanes[lane].push(...parts);
    const heading = frame.heading_deg === null ? "" : `${Math.round(frame.heading_deg)}°`;
    const share = frame.weight === null ? "" : percent(frame.weight);
    const alone = frame.probability === null || frame.probability === undefined ? "" : `; alone it gives the cell ${percent(frame.probability)}`;
    const words = `Frame ${i + 1} of ${frames.length}${heading ? `, looking to ${heading}` : ""}${share ? `: ${share} of the decision${alone}` : ""}`;
    const bars = parts.map(([a, b], part) => {
      // The larger piece carries the text and is the one to reach by keyboard.
      const main = b - a === Math.max(...parts.map(([c, d]) => d - c)) && (parts.length === 1 || part === parts.findIndex(([c, d]) => d - c === b - a));
      const bar = make(main ? "button" : "span", { class: "bar" + (parts.length > 1 ? (part ? " wrapped-end" : " wrapped-start") : ""), title: words });
      if (main) { bar.type = "button"; bar.setAttribute("aria-label", words); } else bar.setAttribute("aria-hidden", "true");
      const fill = make("i");
      fill.style.opacity = share ? String(0.75 * frame.weight / most) : "0";
      bar.append(fill, make("span", { textContent: main ? share || heading || String(i + 1) : "" }));
      Object.assign(bar.style, { left: `${100 * a}%`, width: `calc(${100 * (b - a)}% - 2px)`, top: `${LANE_PX * lane}px` });
      return bar;
    });
    for (const bar of bars) {
      const light = (on) => { bars.forEach((one) => one.classList.toggle("lit", on)); showWindow(on ? parts : []); };
      bar.addEventListener("mouseenter", () => light(true));
      bar.addEventListener("mouseleave", () => light(false));
      bar.addEventListener("focus", () => light(true));
      bar.addEventListener("blur", () => light(false));
    }
    box.append(...bars);
  });
  box.style.height = `${LANE_PX * lanes.length}px`;
}

function showWindow(parts) {
  ["window", "window-2"].forEach((id, i) => {
    const part = parts[i];
    Object.assign(byId(id).style, part ? { display: "block", left: `${100 * part[0]}%`, width: `${100 * (part[1] - part[0])}%` } : { display: "none" });
  });
  // With two pieces the darkness of the first would lie on the second.
  byId("window").style.boxShadow = parts.length > 1 ? "none" : "";
}
