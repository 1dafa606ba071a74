// Looking around in a panorama: one WebGL triangle and a shader that asks for every pixel where it looks. Without WebGL
// the canvas shows the part of the strip that lies ahead, undistorted corrections left out.

import { byId } from "./dom.js";

const VERTEX = "attribute vec2 p;varying vec2 v;void main(){v=p;gl_Position=vec4(p,0.,1.);}";
const FRAGMENT = `precision highp float;varying vec2 v;uniform sampler2D image;uniform vec2 half_;uniform float yaw,pitch,tall;
void main(){vec3 d=normalize(vec3(v.x*half_.x,v.y*half_.y,1.));
float c=cos(pitch),s=sin(pitch);d=vec3(d.x,d.y*c+d.z*s,d.z*c-d.y*s);
float lon=atan(d.x,d.z)+yaw,lat=asin(clamp(d.y,-1.,1.));float y=.5-lat/tall;
if(y<0.||y>1.){gl_FragColor=vec4(.09,.13,.15,1.);return;}
gl_FragColor=texture2D(image,vec2(fract(lon/6.28318530718+.5),y));}`;
const TURN_DEG = 10;

export class Viewer {
  constructor() {
    this.canvas = byId("viewer");
    this.yaw = this.pitch = 0;
    this.fov = 90;
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(resolution: 1dppx)").addEventListener("change", () => this.draw());
  }

  // Whether a picture goes all around: only then there is something to look around in.
  static fits(picture) {
    return picture.width >= 1.9 * picture.height;
  }

  show(picture, heading) {
    Object.assign(this, { picture, heading, yaw: 0, pitch: 0, fov: 90 });
    this.gl ??= this.context();
    if (this.gl) {
      const { gl } = this, most = Math.min(4096, gl.getParameter(gl.MAX_TEXTURE_SIZE));
      gl.bindTexture(gl.TEXTURE_2D, this.texture);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, picture.width > most ? shrunk(picture, most) : picture);
    }
    this.draw();
  }

  context() {
    const gl = this.canvas.getContext("webgl", { antialias: false, preserveDrawingBuffer: true });
    if (!gl) return null;
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return null;
    gl.useProgram(program);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 3, -1, -1, 3]), gl.STATIC_DRAW);
    const at = gl.getAttribLocation(program, "p");
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, 2, gl.FLOAT, false, 0, 0);
    this.texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, this.texture);
    // No mipmaps: at the seam they would show a line.
    for (const [name, value] of [[gl.TEXTURE_MIN_FILTER, gl.LINEAR], [gl.TEXTURE_MAG_FILTER, gl.LINEAR], [gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE], [gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE]]) gl.texParameteri(gl.TEXTURE_2D, name, value);
    this.at = Object.fromEntries(["half_", "yaw", "pitch", "tall"].map((name) => [name, gl.getUniformLocation(program, name)]));
    return gl;
  }

  draw() {
    const { canvas, gl, picture } = this, ratio = Math.min(2, devicePixelRatio);
    if (!picture || !canvas.clientWidth) return;
    canvas.width = Math.round(canvas.clientWidth * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    // A strip that is not 2:1 spans less than 180° from top to bottom.
    const tall = Math.min(Math.PI, 2 * Math.PI * picture.height / picture.width);
    if (gl) {
      const half = Math.tan(this.fov * Math.PI / 360);
      gl.viewport(0, 0, canvas.width, canvas.height);
      gl.uniform2f(this.at.half_, half, half * canvas.height / canvas.width);
      gl.uniform1f(this.at.yaw, this.yaw * Math.PI / 180);
      gl.uniform1f(this.at.pitch, this.pitch * Math.PI / 180);
      gl.uniform1f(this.at.tall, tall);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    } else this.drawFlat(tall);
    const to = (((this.yaw + (this.heading ?? 0)) % 360) + 360) % 360;
    byId("viewer-words").textContent = `${Math.round(to)}° ${this.heading === null ? "from the picture's centre" : "from north"}${gl ? "" : " (flat: this browser has no WebGL)"}.`;
  }

  drawFlat(tall) {
    const { canvas, picture } = this, context = canvas.getContext("2d");
    const wide = picture.width * this.fov / 360, high = Math.min(picture.height, wide * canvas.height / canvas.width);
    const left = picture.width * (0.5 + this.yaw / 360) - wide / 2;
    const top = Math.max(0, Math.min(picture.height - high, picture.height * (0.5 - this.pitch * Math.PI / 180 / tall) - high / 2));
    for (let turn = -1; turn <= 1; turn++) {
      const x = (turn * picture.width - ((left % picture.width) + picture.width) % picture.width) * canvas.width / wide;
      context.drawImage(picture, 0, top, picture.width, high, x, 0, picture.width * canvas.width / wide, canvas.height);
    }
  }

  turn(yaw, pitch, zoom = 1) {
    this.yaw += yaw;
    this.pitch = Math.max(-85, Math.min(85, this.pitch + pitch));
    this.fov = Math.max(25, Math.min(120, this.fov * zoom));
    this.draw();
  }

  listen() {
    const { canvas } = this;
    let from = null;
    canvas.addEventListener("pointerdown", (event) => { from = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      if (!from) return;
      const perPx = this.fov / canvas.clientWidth;
      this.turn((from[0] - event.clientX) * perPx, (event.clientY - from[1]) * perPx);
      from = [event.clientX, event.clientY];
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { from = null; });
    const moves = { ArrowLeft: [-TURN_DEG, 0], ArrowRight: [TURN_DEG, 0], ArrowUp: [0, TURN_DEG], ArrowDown: [0, -TURN_DEG], "+": [0, 0, 0.85], "=": [0, 0, 0.85], "-": [0, 0, 1.18] };
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Home") { this.yaw = this.pitch = 0; this.fov = 90; this.draw(); }
      else if (moves[event.key]) this.turn(...moves[event.key]);
      else return;
      event.preventDefault();
    });
  }
}

function shrunk(picture, width) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.round(picture.height * width / picture.width);
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas;
}
