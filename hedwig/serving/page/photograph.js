// Files before they are sent: is each a picture, is it small enough, and what does it look like. The preview is the
// browser's own decoding, scaled down; when that fails the file is sent all the same and the service judges.

import { Refused } from "./api.js";
import { bytes } from "./words.js";

const MOST_PX = 4096;
const STRIP_HEIGHT_PX = 512;

export async function check(files, limits) {
  if (files.length > limits.max_batch) {
    throw new Refused(0, "too_many", `You chose ${files.length} files; at most ${limits.max_batch} are one place.`, "Choose fewer.");
  }
  for (const file of files) {
    if (!(await isPicture(file))) {
      throw new Refused(0, "wrong_type", `${file.name} is not a JPEG, PNG or WebP file.`, "Export it as JPEG, then drop it here. Nothing was sent.");
    }
  }
  // Several travel in base64, which takes four bytes for three.
  const size = files.reduce((sum, file) => sum + file.size, 0) * (files.length > 1 ? 4 / 3 : 1);
  if (size > limits.max_body_bytes) {
    throw new Refused(0, "too_large", `${files.length > 1 ? "Together they are" : `${files[0].name} is`} ${bytes(size)}; at most ${bytes(limits.max_body_bytes)} are accepted.`,
      "Shrink the picture, or save it as JPEG. Nothing was sent.");
  }
}

async function isPicture(file) {
  const head = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...head);
  return text.startsWith("\xff\xd8\xff") || text.startsWith("\x89PNG\r\n\x1a\n") || (text.startsWith("RIFF") && text.slice(8, 12) === "WEBP");
}

// A canvas at most MOST_PX wide, or null where the browser cannot read it.
async function decoded(file) {
  const url = URL.createObjectURL(file), image = new Image();
  try {
    image.src = url;
    await image.decode();
    const scale = Math.min(1, MOST_PX / image.naturalWidth, MOST_PX / image.naturalHeight);
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(image.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(image.naturalHeight * scale));
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    return canvas;
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(url);
  }
}

// One picture as it is; several side by side, clockwise by heading and scaled to one height, as the service counts x0.
export async function preview(files, headings) {
  const canvases = await Promise.all(files.map(decoded));
  if (canvases.includes(null)) return null;
  if (canvases.length === 1) return canvases[0];
  const turn = headings ? headings.map((deg) => ((deg % 360) + 360) % 360) : canvases.map((_, i) => i);
  const order = canvases.map((_, i) => i).sort((a, b) => turn[a] - turn[b]);
  const widths = order.map((i) => Math.round(canvases[i].width * STRIP_HEIGHT_PX / canvases[i].height));
  const strip = document.createElement("canvas");
  strip.width = widths.reduce((a, b) => a + b, 0);
  strip.height = STRIP_HEIGHT_PX;
  let x = 0;
  order.forEach((i, rank) => {
    strip.getContext("2d").drawImage(canvases[i], x, 0, widths[rank], STRIP_HEIGHT_PX);
    x += widths[rank];
  });
  return strip;
}
