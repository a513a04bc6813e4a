"use strict";
// The cells of a window as pixels. Where a line of pixels stands for many rows, some of them are
// looked at, and those at which the mask changes; a pixel shows what share of its cells is allowed.

const SAMPLES = 4; // rows that are looked at for one line of pixels
const FAINTEST = 0.3; // what a line of pixels shows of one cell among thousands

/** Draw a window into an image: `i0`, `j0` are its first row and key, `sy`, `sx` pixels of a cell. */
function paint(image, matrix, { i0, j0, sy, sx }, ground) {
  const { width, height, data } = image, [rows, keys] = matrix.sizes;
  const line = new Float32Array(4 * width);
  const marks = sy < 1 ? matrix.landmarks : [];
  let before = -1;
  for (let y = 0; y < height; y++) {
    const some = rowsAt(y, i0, sy, rows, marks);
    const to = 4 * width * y;
    if (some.length === 1 && some[0] === before) {
      data.copyWithin(to, to - 4 * width, to);
      continue;
    }
    before = some.length === 1 ? some[0] : -1;
    if (!some.length) continue;
    line.fill(0);
    for (const i of some) {
      matrix.row(i, Math.floor(j0), Math.ceil(j0 + width / sx), (a, b, share, colour) => {
        fill(line, width, (a - j0) * sx, (b - j0) * sx, share, colour, sx >= 1);
      });
    }
    const last = Math.min(width, Math.round((keys - j0) * sx));
    for (let x = 0; x < last; x++) blend(data, to + 4 * x, line, 4 * x, some.length, ground);
  }
  return image;
}

/** The rows that a line of pixels stands for, or some of them. */
function rowsAt(y, i0, sy, rows, marks) {
  if (sy >= 1) {
    const i = Math.floor(i0 + (y + 0.5) / sy);
    return i >= 0 && i < rows ? [i] : [];
  }
  const first = Math.max(0, Math.floor(i0 + y / sy));
  const last = Math.min(rows, Math.max(first + 1, Math.floor(i0 + (y + 1) / sy)));
  if (first >= last) return [];
  const some = new Set();
  for (let k = 0; k < SAMPLES; k++) some.add(first + Math.floor(((last - first) * (2 * k + 1)) / (2 * SAMPLES)));
  const mark = lastAt(marks.length, (k) => marks[k], last - 1);
  for (let k = mark; k >= 0 && k > mark - SAMPLES && marks[k] >= first; k--) some.add(marks[k]);
  return [...some];
}

/** Add a run to a line of pixels: its colour, and how much of each pixel it takes. */
function fill(line, width, a, b, share, [red, green, blue], crisp) {
  let first = Math.floor(a), last = Math.ceil(b) - 1;
  if (crisp) [first, last] = [Math.ceil(a - 0.5), Math.ceil(b - 0.5) - 1];
  for (let x = Math.max(0, first); x <= Math.min(width - 1, last); x++) {
    const part = crisp ? share : share * (Math.min(b, x + 1) - Math.max(a, x));
    line[4 * x] += part * red;
    line[4 * x + 1] += part * green;
    line[4 * x + 2] += part * blue;
    line[4 * x + 3] += part;
  }
}

function blend(data, to, line, x, rows, ground) {
  const weight = line[x + 3];
  const share = weight > 0 ? Math.max(FAINTEST, Math.min(1, weight / rows)) : 0;
  for (let k = 0; k < 3; k++) {
    data[to + k] = share ? ground[k] * (1 - share) + (line[x + k] / weight) * share : ground[k];
  }
  data[to + 3] = 255;
}
