"use strict";
// Cells of a score matrix, as patches have them: rows and keys in ranges, and the region of those
// that are meant. A region is strips from the top, [i0, i1, then a, da, b, db of each run]: the run
// [a + da k, b + db k) in row i0 + k. Nothing here knows of calls, colours or the page.

/** The ranges of a side, [start, stop, step]*: where each begins, its step, and its place. */
function spansOf(ends, shift) {
  const spans = [];
  let place = 0;
  for (let k = 0; k < ends.length; k += 3) {
    const count = Math.ceil((ends[k + 1] - ends[k]) / ends[k + 2]);
    spans.push({ start: ends[k] + shift, step: ends[k + 2], count, place });
    place += count;
  }
  return spans;
}

/** The place of a position in a span, or -1. */
function placeIn(span, position) {
  const k = (position - span.start) / span.step;
  return Number.isInteger(k) && k >= 0 && k < span.count ? span.place + k : -1;
}

/** The last index whose entry begins at or before a position, or -1: `begins` rises. */
function lastAt(count, begins, position) {
  let low = 0, high = count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (begins(middle) <= position) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

class Patch {
  constructor(plain, regions, call, shift) {
    const [number, batch, firstHead, lastHead, rows, keys, region, sure] = plain;
    Object.assign(this, { number, batch, firstHead, lastHead, call, shift, sure: Boolean(sure) });
    this.rows = spansOf(rows, shift[0]);
    this.keys = spansOf(keys, shift[1]);
    this.strips = regions[region];
  }

  get size() {
    const total = (spans) => spans.reduce((sum, span) => sum + span.count, 0);
    return [total(this.rows), total(this.keys)];
  }

  stripAt(u) {
    const strip = this.strips[lastAt(this.strips.length, (k) => this.strips[k][0], u)];
    return strip && u < strip[1] ? strip : null;
  }

  /** The place of a key, or -1. */
  keyPlace(j) {
    for (const span of this.keys) {
      const v = placeIn(span, j);
      if (v >= 0) return v;
    }
    return -1;
  }

  /** Whether the cell of a row and a key, both by place, is meant. */
  has(u, v) {
    const strip = this.stripAt(u);
    if (!strip || v < 0) return false;
    const down = u - strip[0];
    const run = lastAt((strip.length - 2) / 4, (k) => strip[2 + 4 * k] + strip[3 + 4 * k] * down, v);
    return run >= 0 && v < strip[4 + 4 * run] + strip[5 + 4 * run] * down;
  }

  /** How many keys a row by place has. */
  count(u) {
    const strip = this.stripAt(u);
    let sum = 0;
    for (let k = 2; strip && k < strip.length; k += 4) {
      sum += strip[k + 2] - strip[k] + (strip[k + 3] - strip[k + 1]) * (u - strip[0]);
    }
    return sum;
  }

  /** Call `emit(start, stop, share)` for the runs of a row by place that meet [from, to). */
  runs(u, from, to, emit) {
    const strip = this.stripAt(u);
    if (!strip) return;
    const down = u - strip[0];
    for (let k = 2; k < strip.length; k += 4) {
      this.stand(strip[k] + strip[k + 1] * down, strip[k + 2] + strip[k + 3] * down, from, to, emit);
    }
  }

  /** The same for one run of keys by place: where these stand. */
  stand(a, b, from, to, emit) {
    const first = Math.max(0, lastAt(this.keys.length, (k) => this.keys[k].place, a));
    for (let k = first; k < this.keys.length && this.keys[k].place < b; k++) {
      const { start, step, count, place } = this.keys[k];
      const low = Math.max(a - place, 0), high = Math.min(b - place, count) - 1;
      if (low > high) continue;
      const one = start + step * low, other = start + step * high;
      const left = Math.min(one, other), right = Math.max(one, other) + 1, apart = Math.abs(step);
      if (right <= from || left >= to) continue;
      if (apart === 1) emit(left, right, 1);
      else if ((Math.min(right, to) - Math.max(left, from)) / apart > 2048) emit(left, right, 1 / apart);
      else {
        const skip = Math.max(0, Math.ceil((from - left) / apart));
        for (let j = left + skip * apart; j < Math.min(right, to); j += apart) emit(j, j + 1, 1);
      }
    }
  }
}

/** Patches by the rows that they have. */
class Rows {
  constructor(patches, count) {
    this.patches = patches;
    this.height = Math.max(1, Math.ceil(count / 512));
    this.buckets = Array.from({ length: Math.ceil(count / this.height) }, () => []);
    for (const patch of patches) {
      for (const span of patch.rows) {
        const ends = [span.start, span.start + span.step * (span.count - 1)];
        const low = Math.floor(Math.min(...ends) / this.height);
        const high = Math.floor(Math.max(...ends) / this.height);
        for (let k = low; k <= high; k++) this.buckets[k].push({ patch, span });
      }
    }
  }

  /** Call `found(patch, u)` for the patches that have a row, and its place there. */
  at(i, found) {
    for (const { patch, span } of this.buckets[Math.floor(i / this.height)] || []) {
      const u = placeIn(span, i);
      if (u >= 0) found(patch, u);
    }
  }

  /** Rows at which something begins, in order: those that a coarse picture must not miss. */
  get landmarks() {
    const found = new Set();
    for (const patch of this.patches) {
      for (const span of patch.rows) {
        found.add(Math.min(span.start, span.start + span.step * (span.count - 1)));
        if (found.size > 20000) break;
        if (span.step !== 1) continue;
        for (const strip of patch.strips) {
          const k = strip[0] - span.place;
          if (k > 0 && k < span.count && found.size < 20000) found.add(span.start + k);
        }
      }
    }
    return Float64Array.from(found).sort();
  }
}
