// The map: country outlines, geocells shaded by probability, neighbours, the answer, its circles, and a heat map.
// Leaflet draws; there are no tiles. All marks are also in the lists, so the map itself may be skipped by ear.

import { byId, colour } from "./dom.js";
import { heatOverlay } from "./heat.js";
import { country, km, percent } from "./words.js";

const L = window.L;
const FAINT = 0.002; // a cell below this share keeps its plain look
const WORLD = [[-58, -168], [76, 178]];

export class WorldMap {
  constructor() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.map = L.map("map", {
      preferCanvas: true, attributionControl: false, zoomSnap: 0.25, minZoom: 0.5, maxZoom: 13, zoomAnimation: !still, fadeAnimation: !still,
      inertia: !still, maxBounds: [[-86, -220], [86, 220]], maxBoundsViscosity: 0.8,
    });
    this.still = still;
    // Panes decide what lies on what; a canvas for each.
    this.renderers = {};
    for (const [name, z] of [["land", 300], ["cells", 350], ["heat", 450], ["marks", 500]]) {
      this.map.createPane(name).style.zIndex = z;
      if (name !== "marks") this.map.getPane(name).style.pointerEvents = name === "cells" ? "auto" : "none";
      if (name !== "heat") this.renderers[name] = L.canvas({ pane: name, padding: 0.3 });
    }
    this.map.getPane("marks").style.pointerEvents = "none";
    L.control.scale({ imperial: false }).addTo(this.map);
    this.features = new Map();
    this.layers = new Map();
    this.heat = null;
    this.marks = { neighbours: L.layerGroup(), rings: L.layerGroup().addTo(this.map), answer: L.layerGroup().addTo(this.map), lit: L.layerGroup().addTo(this.map) };
    this.marks.neighbours.addTo(this.map);
    this.showWorld();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint());
    new ResizeObserver(() => this.map.invalidateSize()).observe(byId("map"));
  }

  showWorld() { this.map.fitBounds(WORLD, { animate: false }); }

  drawLand(collection) {
    this.land = L.geoJSON(collection, { interactive: false, renderer: this.renderers.land, pane: "land",
      style: () => ({ color: colour("border"), weight: 0.8, fillColor: colour("land"), fillOpacity: 1 }) }).addTo(this.map);
  }

  drawCells(collection) {
    this.cellLayer?.remove();
    this.features.clear();
    this.layers.clear();
    for (const feature of collection.features) this.features.set(feature.properties.cell_id, feature.properties);
    this.cellLayer = L.geoJSON(collection, { renderer: this.renderers.cells, pane: "cells", smoothFactor: 0.7,
      style: (feature) => this.cellStyle(feature.properties.cell_id),
      onEachFeature: (feature, layer) => {
        this.layers.set(feature.properties.cell_id, layer);
        layer.bindTooltip(() => this.cellWords(feature.properties), { sticky: true });
      } });
    if (byId("show-cells").checked) this.cellLayer.addTo(this.map);
    if (this.answer) this.shade();
    else this.map.fitBounds(this.cellLayer.getBounds().isValid() ? this.cellLayer.getBounds().pad(0.05) : WORLD, { animate: false });
  }

  countryOf = (id) => this.features.get(id)?.country ?? "";

  cellWords(cell) {
    const box = document.createElement("span");
    const share = this.shares?.get(cell.cell_id);
    box.textContent = [[cell.admin1, country(cell.country)].filter(Boolean).join(", "), share ? percent(share) : null, `cell ${cell.cell_id}`].filter(Boolean).join(" · ");
    return box;
  }

  cellStyle(id) {
    const share = this.shares?.get(id) ?? 0;
    const plain = { stroke: true, color: colour("cell"), weight: 0.6, opacity: 0.55, fillColor: colour("amber"), fillOpacity: 0, fill: true, dashArray: null };
    if (share < FAINT) return plain;
    // The root: a tenth of the best must still be seen.
    const depth = Math.sqrt(share / this.most);
    const inHalf = this.answer.region_50?.includes(id), inMost = this.answer.region_90?.includes(id);
    return { ...plain, fillOpacity: 0.12 + 0.68 * depth, opacity: 1, color: inMost || inHalf ? colour("amber-ink") : colour("cell"),
      weight: inHalf ? 2 : inMost ? 1.2 : 0.6, dashArray: inMost && !inHalf ? "4 3" : null };
  }

  shade() {
    for (const [id, layer] of this.layers) layer.setStyle(this.cellStyle(id));
  }

  clear() {
    this.answer = this.shares = null;
    for (const group of Object.values(this.marks)) group.clearLayers();
    this.heat?.remove();
    this.heat = null;
    this.shade();
  }

  show(answer) {
    this.clear();
    this.answer = answer;
    const listed = answer.posterior ?? { cell_ids: answer.cell_ids, probs: answer.cell_probs };
    this.shares = new Map(listed.cell_ids.map((id, i) => [id, listed.probs[i] ?? 0]));
    this.most = Math.max(1e-9, ...this.shares.values());
    this.shade();
    this.mark();
    this.heatShown(byId("show-heat").checked);
    this.fit();
  }

  mark() {
    const { answer, marks, renderers } = this, pane = "marks", renderer = renderers.marks;
    const put = (shape, group) => shape.addTo(group);
    for (const area of answer.areas ?? []) {
      const half = answer.precision_km / 2 / 111.195, wide = half / Math.max(0.05, Math.cos(area.lat * Math.PI / 180));
      put(L.rectangle([[area.lat - half, area.lon - wide], [area.lat + half, area.lon + wide]],
        { renderer, pane, color: colour("amber-ink"), weight: 1, fillColor: colour("amber"), fillOpacity: 0.1 + 0.6 * area.prob }), marks.rings);
    }
    for (const [radius, dash, weight] of [[answer.radius_km, "6 5", 1.8], [answer.radius_50_km, null, 1.8]]) {
      if (radius && answer.lat !== null) {
        put(L.circle([answer.lat, answer.lon], { radius: radius * 1000, renderer, pane, color: colour("ink"), weight, dashArray: dash, fill: false }), marks.rings);
      }
    }
    (answer.neighbour_lat ?? []).forEach((lat, i) => {
      const lon = answer.neighbour_lon[i];
      if (lat === null || lon === null) return;
      put(L.circleMarker([lat, lon], { renderer, pane, radius: 5, color: colour("card"), weight: 1.5, fillColor: colour("blue"), fillOpacity: 1 }), marks.neighbours);
    });
    if (answer.lat === null || answer.lon === null) return;
    // The answer is an owl's eye.
    const at = [answer.lat, answer.lon];
    put(L.circleMarker(at, { renderer, pane, radius: 10, color: colour("ink"), weight: 2, fillColor: colour("amber"), fillOpacity: 1 }), marks.answer);
    put(L.circleMarker(at, { renderer, pane, radius: 4, stroke: false, fillColor: colour("ink"), fillOpacity: 1 }), marks.answer);
  }

  fit() {
    const { answer } = this;
    if (answer.lat === null) return;
    const bounds = L.latLng(answer.lat, answer.lon).toBounds(2000 * Math.max(2, answer.radius_km ?? 50));
    const near = answer.region_50?.length ? answer.region_50 : answer.cell_ids.slice(0, 1);
    for (const id of near.slice(0, 12)) {
      const layer = this.layers.get(id);
      if (layer) bounds.extend(layer.getBounds());
    }
    for (const area of answer.areas ?? []) bounds.extend([area.lat, area.lon]);
    this.map.fitBounds(bounds, { padding: [14, 14], maxZoom: 11, animate: false });
  }

  // One cell or point of the lists; null puts the light out. `follow` moves the map to it.
  light(what, follow = false) {
    this.marks.lit.clearLayers();
    if (!what) return;
    const style = { renderer: this.renderers.marks, pane: "marks", color: colour("ink"), weight: 3.5, fill: false };
    const layer = what.cell === undefined ? null : this.layers.get(what.cell);
    if (layer) L.geoJSON(layer.toGeoJSON(), { ...style, interactive: false, style: () => style }).addTo(this.marks.lit);
    else if (typeof what.lat === "number" && typeof what.lon === "number") L.circleMarker([what.lat, what.lon], { ...style, radius: 13 }).addTo(this.marks.lit);
    else return;
    const bounds = layer ? layer.getBounds() : L.latLngBounds([[what.lat, what.lon]]);
    if (follow) this.map.fitBounds(bounds.pad(0.8), { maxZoom: Math.max(8, this.map.getZoom()), animate: !this.still });
    else if (!this.map.getBounds().contains(bounds.getCenter())) this.map.panTo(bounds.getCenter(), { animate: !this.still });
  }

  layerShown(name, shown) {
    const layer = name === "cells" ? this.cellLayer : this.marks[name];
    if (layer) layer[shown ? "addTo" : "removeFrom"](this.map);
  }

  heatShown(shown) {
    this.heat?.remove();
    this.heat = shown && this.answer ? heatOverlay(this.answer, this.features, "heat") : null;
    this.heat?.addTo(this.map);
  }

  repaint() {
    this.land?.setStyle({ color: colour("border"), fillColor: colour("land") });
    if (!this.answer) { this.shade(); return; }
    for (const group of Object.values(this.marks)) group.clearLayers();
    this.shade();
    this.mark();
    this.heatShown(byId("show-heat").checked);
  }
}

export const cellTitle = (cell, id) => (cell ? [cell.admin1, country(cell.country)].filter(Boolean).join(", ") : `Cell ${id}`);
export const cellDetail = (cell, id) => (cell ? `cell ${id} · ${cell.num_panoramas} references · ${km(cell.radius_km)} across the middle` : "");
