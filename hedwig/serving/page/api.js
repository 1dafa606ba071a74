// The service, as the page asks it. A refusal becomes a Refused with the server's own code, message and advice; what
// the server cannot say (that it is not there) is said here. The key lives in this module's memory and nowhere else.

let key = "";
export const useKey = (text) => { key = text.trim(); };

export class Refused extends Error {
  constructor(status, code, message, next, waitS = 0) {
    super(message);
    Object.assign(this, { status, code, next, waitS });
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const offline = navigator.onLine === false;
    throw new Refused(0, offline ? "offline" : "unreachable",
      offline ? "This computer is offline." : "The service did not answer.",
      offline ? "Connect it, then try again." : "See whether it still runs and whether this address is still right, then try again.");
  }
  if (response.ok) return response;
  let told = {};
  try { told = (await response.json()).error ?? {}; } catch { /* a proxy's own page */ }
  const waitS = Number(response.headers.get("Retry-After"));
  throw new Refused(response.status, told.code ?? `http_${response.status}`, told.message ?? `The answer was ${response.status}.`,
    told.next ?? "Try again; if it stays so, tell the operator.", Number.isFinite(waitS) ? waitS : 0);
}

export const info = async () => (await ask("v1/info")).json();
export const cells = async () => (await ask("v1/cells?tolerance_deg=0.1")).json();
export const land = async () => (await ask("page/land.json")).json();

// asked: {files, headings: [deg] | null, heading: deg | null, topK, explain}
export async function locate(asked, { format = "json", signal } = {}) {
  const wanted = new URLSearchParams({ top_k: String(asked.topK) });
  if (format === "json") {
    wanted.set("posterior", "true");
    if (asked.explain) wanted.set("explain", "true");
  } else wanted.set("format", format);
  let body, type;
  if (asked.files.length === 1) {
    body = asked.files[0];
    type = "application/octet-stream"; // the server looks at the bytes, not at a name
    if (asked.heading !== null) wanted.set("heading", String(asked.heading));
  } else {
    body = JSON.stringify({ images: await Promise.all(asked.files.map(base64)), headings_deg: asked.headings });
    type = "application/json";
  }
  const response = await ask(`v1/locate?${wanted}`, { method: "POST", body, headers: { "Content-Type": type }, signal });
  return format === "json" ? response.json() : response.blob();
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refused(0, "unreadable", `${file.name} could not be read.`, "Choose it again."));
    reader.readAsDataURL(file);
  });
}
