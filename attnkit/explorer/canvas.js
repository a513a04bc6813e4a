"use strict";
// The canvas: a window of a score matrix with axes, grid lines and a chosen cell, and how it moves.

const MARGIN = { left: 64, top: 40, right: 10, bottom: 10 };
const WIDEST = 56; // pixels of a cell, at most
const GRID_FROM = 8, NUMBERS_FROM = 36;
const OVERVIEW = 108;

/** Distances between labels: 1, 2 or 5 times a power of ten, at least so many cells apart. */
function stepOf(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  return Math.max(1, [1, 2, 5, 10].map((k) => k * power).find((step) => step >= least));
}

class Plot {
  constructor(canvas, told) {
    Object.assign(this, { canvas, told, cell: null, waiting: false });
    this.pointers = new Map();
    addEventListener("resize", () => this.resized());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.later());
    this.listen();
  }

  /** Show another matrix; of the same sizes, the window stays. */
  show(matrix) {
    const same = this.matrix && String(this.matrix.sizes) === String(matrix.sizes);
    this.matrix = matrix;
    this.overview = null;
    if (!same) {
      this.cell = null;
      this.fit();
    }
    this.later();
  }

  // -- the window ----------------------------------------------------------------------------

  get width() {
    return Math.max(1, this.canvas.clientWidth - MARGIN.left - MARGIN.right);
  }

  get height() {
    return Math.max(1, this.canvas.clientHeight - MARGIN.top - MARGIN.bottom);
  }

  /** Pixels of a cell where all of the matrix is seen: square, unless it is long and flat. */
  get least() {
    const [rows, keys] = this.matrix.sizes;
    let sy = Math.min(WIDEST, this.height / Math.max(1, rows)), sx = Math.min(WIDEST, this.width / Math.max(1, keys));
    const ratio = keys / Math.max(1, rows);
    if (ratio > 0.25 && ratio < 4) sx = sy = Math.min(sx, sy);
    return { sy, sx };
  }

  get isWhole() {
    const { sy, sx } = this.least;
    return this.sy <= sy * 1.001 && this.sx <= sx * 1.001;
  }

  fit() {
    this.canvas.style.height = ""; // as the style says, but no higher than the matrix may get
    const [rows, keys] = this.matrix.sizes, wide = this.width / Math.max(1, keys);
    const square = keys < 4 * rows ? Math.max(260, rows * Math.min(WIDEST, wide)) : rows * WIDEST;
    const high = Math.max(60, Math.min(this.height, rows * WIDEST, square)) + MARGIN.top + MARGIN.bottom;
    this.canvas.style.height = `${Math.ceil(high)}px`;
    Object.assign(this, this.least, { i0: 0, j0: 0 });
    this.later();
  }

  resized() {
    if (!this.matrix) return;
    if (this.wasWhole) this.fit();
    this.zoom(1);
  }

  /** Zoom around a point of the canvas: that of the chosen cell, or the middle. */
  zoom(factor, x = null, y = null) {
    const [atX, atY] = x === null ? this.middle() : [x - MARGIN.left, y - MARGIN.top];
    const least = this.least, j = this.j0 + atX / this.sx, i = this.i0 + atY / this.sy;
    const [most, low] = [WIDEST, (side) => Math.min(WIDEST, Math.max(least[side], this[side] * factor))];
    this.sx = Math.min(most, low("sx"));
    this.sy = Math.min(most, low("sy"));
    this.move(i - atY / this.sy, j - atX / this.sx);
  }

  middle() {
    if (this.cell) {
      const x = (this.cell[1] + 0.5 - this.j0) * this.sx, y = (this.cell[0] + 0.5 - this.i0) * this.sy;
      if (x >= 0 && y >= 0 && x <= this.width && y <= this.height) return [x, y];
    }
    return [this.width / 2, this.height / 2];
  }

  /** Let the window begin at a row and a key: the last ones get no further than where all is seen. */
  move(i0, j0) {
    const [rows, keys] = this.matrix.sizes, { sy, sx } = this.least;
    this.i0 = Math.max(0, Math.min(i0, rows - (rows * sy) / this.sy));
    this.j0 = Math.max(0, Math.min(j0, keys - (keys * sx) / this.sx));
    this.later();
  }

  /** Zoom to single cells, around the chosen one. */
  toCells() {
    if (!this.cell) this.choose(...this.someCell());
    Object.assign(this, { sx: WIDEST, sy: WIDEST });
    const [i, j] = this.cell || [0, 0];
    this.move(i + 0.5 - this.height / this.sy / 2, j + 0.5 - this.width / this.sx / 2);
  }

  /** A cell of the middle row that is seen: the last allowed one. */
  someCell() {
    const [i0, i1, j0, j1] = this.window, i = (i0 + i1) >> 1;
    let j = (j0 + j1) >> 1;
    if (i < i1) this.matrix.row(i, j0, j1, (a, b) => (j = Math.min(b, j1) - 1));
    return [i, j];
  }

  // -- the chosen cell -----------------------------------------------------------------------

  cellAt(x, y) {
    const i = Math.floor(this.i0 + (y - MARGIN.top) / this.sy), j = Math.floor(this.j0 + (x - MARGIN.left) / this.sx);
    const inside = x >= MARGIN.left && y >= MARGIN.top && i < this.matrix.sizes[0] && j < this.matrix.sizes[1];
    return inside ? [i, j] : null;
  }

  /** Where the middle of a cell is, in pixels of the canvas. */
  placeOf(i, j) {
    return [MARGIN.left + (j + 0.5 - this.j0) * this.sx, MARGIN.top + (i + 0.5 - this.i0) * this.sy];
  }

  choose(i, j, aloud = false) {
    const [rows, keys] = this.matrix.sizes;
    if (!rows || !keys) return;
    const cell = [Math.max(0, Math.min(rows - 1, i)), Math.max(0, Math.min(keys - 1, j))];
    if (this.cell && String(cell) === String(this.cell) && !aloud) return;
    this.cell = cell;
    this.told(...cell, aloud);
    this.later();
  }

  /** Let the window follow the chosen cell. */
  follow() {
    const [i, j] = this.cell, seen = [this.height / this.sy, this.width / this.sx];
    const within = (at, first, count) => Math.min(at, Math.max(first, at + 1 - count));
    this.move(within(i, this.i0, seen[0]), within(j, this.j0, seen[1]));
  }

  // -- what is done to it --------------------------------------------------------------------

  listen() {
    const { canvas } = this;
    const at = (event) => [event.offsetX, event.offsetY];
    canvas.addEventListener("wheel", (event) => {
      if (event.deltaY > 0 && this.isWhole && !event.ctrlKey) return; // the page scrolls
      event.preventDefault();
      this.zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) / 240), ...at(event));
      this.pointAt(...at(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      this.pointers.set(event.pointerId, at(event));
      this.dragged = this.pointers.size > 1;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => this.moved(event, at(event)));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => {
        if (name === "pointerup" && !this.dragged) this.pointAt(...at(event), true);
        this.pointers.delete(event.pointerId);
      });
    }
    canvas.addEventListener("dblclick", (event) => this.zoom(3, ...at(event)));
    canvas.addEventListener("keydown", (event) => this.pressed(event));
    canvas.addEventListener("focus", () => this.later());
    canvas.addEventListener("blur", () => this.later());
  }

  pointAt(x, y, aloud = false) {
    const cell = this.cellAt(x, y);
    if (cell) this.choose(...cell, aloud);
  }

  moved(event, [x, y]) {
    const last = this.pointers.get(event.pointerId);
    if (!last) return this.pointAt(x, y);
    const apart = Math.hypot(x - last[0], y - last[1]);
    if (!this.dragged && apart < 5) return undefined;
    this.dragged = true;
    const other = [...this.pointers].find(([id]) => id !== event.pointerId);
    this.pointers.set(event.pointerId, [x, y]);
    if (other) {
      const [p, q] = other[1], was = Math.hypot(last[0] - p, last[1] - q);
      const factor = Math.hypot(x - p, y - q) / Math.max(1, was);
      this.zoom(factor, (x + p) / 2, (y + q) / 2);
    }
    const part = other ? 0.5 : 1; // of two fingers, each moves the middle by half
    return this.move(this.i0 - (part * (y - last[1])) / this.sy, this.j0 - (part * (x - last[0])) / this.sx);
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [i, j] = this.cell || [Math.floor(this.i0), Math.floor(this.j0)];
    const far = event.shiftKey ? 10 : 1, [rows, keys] = this.matrix.sizes;
    const screen = Math.max(1, Math.floor(this.height / this.sy) - 1);
    const cells = {
      ArrowUp: [i - far, j], ArrowDown: [i + far, j], ArrowLeft: [i, j - far], ArrowRight: [i, j + far],
      PageUp: [i - screen, j], PageDown: [i + screen, j], Home: [i, 0], End: [i, keys - 1],
    };
    const acts = { "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(), Enter: () => this.toCells() };
    if (cells[event.key]) {
      this.choose(...(this.cell ? cells[event.key] : [i, j]), true);
      if (rows && keys) this.follow();
    } else if (acts[event.key]) acts[event.key]();
    else return;
    event.preventDefault();
  }

  // -- drawing -------------------------------------------------------------------------------

  later() {
    if (this.waiting || !this.matrix) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  colours() {
    const style = getComputedStyle(this.canvas);
    const read = (name) => style.getPropertyValue(name).trim();
    return { ground: parted(read("--masked")), ink: read("--ink"), quiet: read("--quiet"), lines: read("--lines"), chosen: read("--chosen"), font: style.fontFamily };
  }

  draw() {
    const { canvas } = this, many = Math.min(2, devicePixelRatio || 1), colours = this.colours();
    canvas.width = canvas.clientWidth * many;
    canvas.height = canvas.clientHeight * many;
    this.wasWhole = this.isWhole;
    canvas.classList.toggle("zoomed", !this.wasWhole);
    const context = canvas.getContext("2d");
    context.putImageData(this.painted(context, many, colours.ground), MARGIN.left * many, MARGIN.top * many);
    context.scale(many, many);
    this.axes(context, colours);
    if (Math.min(this.sx, this.sy) >= GRID_FROM) this.grid(context, colours);
    if (Math.min(this.sx, this.sy) >= NUMBERS_FROM) this.numbers(context, colours);
    this.mark(context, colours);
    if (!this.wasWhole) this.drawOverview(context, colours);
  }

  /** The cells that are seen; of the same window they are painted once, whichever is chosen. */
  painted(context, many, ground) {
    const seen = { i0: this.i0, j0: this.j0, sy: this.sy * many, sx: this.sx * many };
    const sizes = [Math.ceil(this.width * many), Math.ceil(this.height * many)];
    const key = JSON.stringify([seen, sizes, ground]);
    if (this.kept?.key !== key || this.kept.matrix !== this.matrix) {
      const image = paint(context.createImageData(...sizes), this.matrix, seen, ground);
      this.kept = { key, matrix: this.matrix, image };
    }
    return this.kept.image;
  }

  /** The rows and keys that are seen. */
  get window() {
    const [rows, keys] = this.matrix.sizes, end = (first, pixels, size, most) => Math.min(most, Math.ceil(first + pixels / size));
    return [Math.floor(this.i0), end(this.i0, this.height, this.sy, rows), Math.floor(this.j0), end(this.j0, this.width, this.sx, keys)];
  }

  axes(context, { ink, quiet, font }) {
    const [i0, i1, j0, j1] = this.window;
    context.font = `11px ${font}`;
    context.fillStyle = quiet;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText("key j", MARGIN.left, 8);
    context.textAlign = "right";
    const down = stepOf(22 / this.sy), digits = 7 * told(j1).length + 14, right = stepOf(digits / this.sx);
    context.fillStyle = ink;
    for (let i = Math.ceil(i0 / down) * down; i < i1; i += down) {
      const y = MARGIN.top + (i + 0.5 - this.i0) * this.sy;
      if (y > MARGIN.top - 2 && y < MARGIN.top + this.height) context.fillText(told(i), MARGIN.left - 6, y);
    }
    context.textAlign = "center";
    for (let j = Math.ceil(j0 / right) * right; j < j1; j += right) {
      const x = MARGIN.left + (j + 0.5 - this.j0) * this.sx;
      if (x > MARGIN.left - 2 && x < MARGIN.left + this.width - 12) context.fillText(told(j), Math.max(x, MARGIN.left + 4), MARGIN.top - 10);
    }
    context.textAlign = "right";
    context.fillStyle = quiet;
    context.fillText("query i", MARGIN.left - 12, 8);
  }

  clip(context) {
    const [rows, keys] = this.matrix.sizes;
    const wide = Math.min(this.width, (keys - this.j0) * this.sx), high = Math.min(this.height, (rows - this.i0) * this.sy);
    context.beginPath();
    context.rect(MARGIN.left, MARGIN.top, wide, high);
    context.clip();
  }

  grid(context, { lines }) {
    const [i0, i1, j0, j1] = this.window;
    context.save();
    this.clip(context);
    context.strokeStyle = lines;
    context.lineWidth = 1;
    context.beginPath();
    for (let i = i0; i <= i1; i++) {
      const y = Math.round(MARGIN.top + (i - this.i0) * this.sy) + 0.5;
      context.moveTo(MARGIN.left, y);
      context.lineTo(MARGIN.left + this.width, y);
    }
    for (let j = j0; j <= j1; j++) {
      const x = Math.round(MARGIN.left + (j - this.j0) * this.sx) + 0.5;
      context.moveTo(x, MARGIN.top);
      context.lineTo(x, MARGIN.top + this.height);
    }
    context.stroke();
    context.restore();
  }

  /** In each cell, where it is for its call: row over key. */
  numbers(context, { font }) {
    const [i0, i1, j0, j1] = this.window;
    if (!this.matrix.label) return;
    context.save();
    this.clip(context);
    context.font = `10px ${font}`;
    context.textAlign = "center";
    for (let i = i0; i < i1; i++) {
      this.matrix.row(i, j0, j1, (a, b, share, colour) => {
        context.fillStyle = inkOn(colour);
        for (let j = Math.max(a, j0); j < Math.min(b, j1); j++) {
          const label = this.matrix.label(i, j), [x, y] = this.placeOf(i, j);
          if (!label) continue;
          context.fillText(label[0], x, y - 6);
          context.fillText(label[1], x, y + 7);
        }
      });
    }
    context.restore();
  }

  mark(context, { chosen }) {
    if (!this.cell) return;
    const [x, y] = this.placeOf(...this.cell);
    const wide = Math.max(7, this.sx), high = Math.max(7, this.sy);
    context.save();
    this.clip(context);
    context.strokeStyle = chosen;
    context.lineWidth = 1;
    context.globalAlpha = 0.25;
    if (Math.min(wide, high) < NUMBERS_FROM) {
      context.strokeRect(MARGIN.left - 5, Math.round(y) + 0.5, this.width + 10, 0);
      context.strokeRect(Math.round(x) + 0.5, MARGIN.top - 5, 0, this.height + 10);
    }
    context.globalAlpha = 1;
    context.lineWidth = 2;
    context.strokeRect(x - wide / 2, y - high / 2, wide, high);
    context.restore();
  }

  /** All of the matrix in a corner, and where the window is. */
  drawOverview(context, { ground, ink, quiet }) {
    const [rows, keys] = this.matrix.sizes, { sy, sx } = this.least;
    const size = Math.min(OVERVIEW, this.width / 4) / Math.max(sy * rows, sx * keys);
    const wide = Math.max(8, Math.round(size * sx * keys)), high = Math.max(8, Math.round(size * sy * rows));
    if (!this.overview || this.overview.width !== wide) {
      this.overview = document.createElement("canvas");
      Object.assign(this.overview, { width: wide, height: high });
      const own = this.overview.getContext("2d");
      own.putImageData(paint(own.createImageData(wide, high), this.matrix, { i0: 0, j0: 0, sy: high / rows, sx: wide / keys }, ground), 0, 0);
    }
    const top = MARGIN.top + this.height - high - 8;
    let left = MARGIN.left + this.width - wide - 8;
    const [x, y] = this.cell ? this.placeOf(...this.cell) : [0, 0];
    if (x > left - this.sx && y > top - this.sy) left = MARGIN.left + 8; // not over the chosen cell
    context.drawImage(this.overview, left, top);
    context.strokeStyle = quiet;
    context.strokeRect(left - 0.5, top - 0.5, wide + 1, high + 1);
    context.strokeStyle = ink;
    context.lineWidth = 1.5;
    const part = [this.width / this.sx / keys, this.height / this.sy / rows].map((share) => Math.min(1, share));
    context.strokeRect(left + (this.j0 / keys) * wide, top + (this.i0 / rows) * high, Math.max(3, part[0] * wide), Math.max(3, part[1] * high));
  }
}
