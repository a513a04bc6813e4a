"use strict";
// What a score matrix is made of: `at(i, j)` says all that is known of a cell, `row(i, ...)` gives
// the runs of a row in their colours. A matrix is that of a batch element (or of all sequences of a
// packed batch, down the diagonal: "all") and a head.

const COLOURS = COLOURS_OF_ALL_PICTURES.map(parted); // what writes the page puts them here
const MAYBE = [150, 160, 180];

/** "#rrggbb" as three numbers. */
function parted(colour) {
  return colour.slice(1).match(/../g).map((part) => parseInt(part, 16));
}

function shade(colour, share) {
  return colour.map((part) => Math.round(part + (255 - part) * share));
}

/** Black or white: what is read better on a colour. */
function inkOn(colour) {
  const [red, green, blue] = colour.map((part) => (part / 255) ** 2.2); // as much light as it gives
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#000" : "#fff";
}

function css(colour) {
  return `rgb(${colour.join(",")})`;
}

function told(count) {
  return count.toLocaleString("en");
}

function plural(count, name) {
  return `${told(count)} ${name}${count === 1 ? "" : "s"}`;
}

/** What the models of calls and of ranks have in common: the mask. */
class Matrix {
  constructor(data, batch, head) {
    Object.assign(this, { data, batch, head });
    const last = data.sizes.length;
    this.sizes = batch === "all" ? [data.starts[0][last], data.starts[1][last]] : data.sizes[batch];
    this.allowed = this.rowsOf(data.allowed, -1);
  }

  /** Some patches as they lie in this matrix; others are left out. */
  patches(plain, call) {
    const { batch, head, data } = this;
    const own = plain.filter((one) => (batch === "all" || one[1] === batch) && one[2] <= head && head < one[3]);
    const shift = (one) => (batch === "all" ? [data.starts[0][one[1]], data.starts[1][one[1]]] : [0, 0]);
    return own.map((one) => new Patch(one, data.regions, call, shift(one)));
  }

  rowsOf(plain, call) {
    return new Rows(this.patches(plain, call), this.sizes[0]);
  }

  /** Which batch element a row is of, and where its keys begin and end. */
  sequenceOf(i) {
    if (this.batch !== "all") return [this.batch, 0, 0, this.sizes[1]];
    const [queries, keys] = this.data.starts;
    const k = lastAt(queries.length - 1, (n) => queries[n], i);
    return [k, queries[k], keys[k], keys[k + 1]];
  }

  /** Whether a cell is allowed (null: it may be), and how many keys its row has. */
  mask(i, j) {
    let allowed = false, keys = 0, sure = true;
    this.allowed.at(i, (patch, u) => {
      keys += patch.count(u);
      sure = sure && patch.sure;
      if (patch.has(u, patch.keyPlace(j))) allowed = patch.sure ? true : null;
    });
    return { allowed, keys, sure };
  }

  /** Rows at which the mask changes; at those where a call begins it looks the same. */
  get landmarks() {
    if (!this.kept) this.kept = this.allowed.landmarks;
    return this.kept;
  }

  row(i, from, to, emit) {
    this.allowed.at(i, (patch, u) => {
      const colour = patch.sure ? COLOURS[0] : MAYBE;
      patch.runs(u, from, to, (a, b, share) => emit(a, b, share, colour));
    });
  }
}

/** The calls of a view. */
class Calls extends Matrix {
  constructor(data, view, batch, head) {
    super(data, batch, head);
    this.calls = data.views[view].calls;
    const found = this.calls.flatMap((call, n) => this.patches(call.patches || [], n));
    this.computed = new Rows(found, this.sizes[0]);
    this.known = this.calls.length > 0 && this.calls.every((call) => call.patches);
  }

  colour(call, number) {
    // Sequences of a single call take turns with the colours; of several, with two shades.
    if (this.calls.length === 1) return COLOURS[number % COLOURS.length];
    return number % 2 ? shade(COLOURS[call % COLOURS.length], 0.3) : COLOURS[call % COLOURS.length];
  }

  row(i, from, to, emit) {
    if (!this.known) return super.row(i, from, to, emit);
    this.computed.at(i, (patch, u) => {
      const colour = patch.sure ? this.colour(patch.call, patch.number) : MAYBE;
      patch.runs(u, from, to, (a, b, share) => emit(a, b, share, colour));
    });
  }

  /** All that is known of a cell: by which calls and sequences, and what its row is made of. */
  at(i, j) {
    const hits = [], parts = [];
    this.computed.at(i, (patch, u) => {
      const v = patch.keyPlace(j), count = patch.count(u);
      const own = { call: patch.call, sequence: patch.number };
      if (patch.has(u, v)) hits.push({ ...own, u, v, size: patch.size, heads: [patch.firstHead, patch.lastHead] });
      if (count) parts.push({ ...own, count });
    });
    return { i, j, ...this.mask(i, j), hits, parts };
  }

  label(i, j) {
    const [hit] = this.at(i, j).hits;
    return hit ? [hit.u, hit.v] : null;
  }

  /** The facts of a cell as labels and sentences. */
  *tell(i, j) {
    const { allowed, keys, sure, hits, parts } = this.at(i, j);
    yield* tellMask(this, i, j, allowed, keys, sure);
    for (const hit of hits) {
      const call = this.calls[hit.call], several = this.calls.length > 1;
      yield ["computed by", `call ${hit.call + 1}${several ? ` of ${this.calls.length}` : ""}: ${call.label}`];
      const which = call.sequences > 1 ? `sequence ${hit.sequence + 1} of ${told(call.sequences)}` : "its only sequence";
      yield ["sequence", `${which}, ${told(hit.size[0])} rows x ${told(hit.size[1])} keys`];
      yield ["there", `row u = ${told(hit.u)}, key v = ${told(hit.v)}`];
      yield ["allowed by", `${call.reads}${here(hit, call.counts_from)}`];
    }
    if (this.known && !hits.length) {
      const wrong = allowed === true ? "no call, so the plan is wrong" : "no call";
      yield ["computed by", wrong];
    }
    if (this.known && hits.length && allowed === false) yield ["but", "the mask does not allow it, so the plan is wrong"];
    if (!this.known && this.calls.length) yield ["computed by", "the cells of these calls are not in the page: they would make it too large"];
    if (parts.length > 1) {
      const some = parts.slice(0, 4).map((part) => {
        const number = this.calls[part.call].sequences > 1 ? ` sequence ${part.sequence + 1}` : "";
        return `call ${part.call + 1}${number} (${plural(part.count, "key")})`;
      });
      const more = parts.length > 4 ? ` and ${parts.length - 4} more` : "";
      yield ["the row", `is answered ${parts.length} times and merged by its statistics: ${some.join(", ")}${more}`];
    }
  }

  *legend() {
    if (!this.known) {
      yield [this.data.per_call ? MAYBE : COLOURS[0], this.data.per_call ? "cells that may be allowed" : "cells that the mask allows"];
      return;
    }
    const single = this.calls.length === 1 && this.calls[0].sequences > 1;
    if (single) {
      const names = new Map();
      for (const { number } of this.computed.patches) {
        const turn = number % COLOURS.length;
        names.set(turn, [...(names.get(turn) || []), number + 1]);
      }
      for (const [turn, own] of [...names].sort((a, b) => a[0] - b[0])) {
        const every = [...new Set(own)];
        yield [COLOURS[turn], `sequence ${every.slice(0, 3).join(", ")}${every.length > 3 ? ", ..." : ""}`];
      }
      return;
    }
    for (const [n, call] of this.calls.entries()) {
      if (n === 12) return void (yield [null, `and ${this.calls.length - n} more calls`]);
      yield [COLOURS[n % COLOURS.length], `call ${n + 1}: ${call.label}`];
    }
  }
}

/** Which distance a cell has, for a call that counts them. */
function here({ u, v, size }, from) {
  if (!from) return "";
  return from === "start" ? `; here it is ${told(v - u)}` : `; here it is ${told(v - size[1] - u + size[0])}`;
}

function* tellMask(matrix, i, j, allowed, keys, sure) {
  const [batch, row, key, end] = matrix.sequenceOf(i);
  if (matrix.batch === "all") {
    if (j < key || j >= end) {
      yield ["mask", "no cell: query and key are of different sequences"];
      return;
    }
    yield ["in the batch", `sequence ${batch + 1}: query ${told(i - row)}, key ${told(j - key)}`];
  }
  const words = { true: "allowed", false: "masked", null: "known only when the call is made" };
  yield ["mask", words[String(allowed)]];
  if (sure) yield ["keys of the row", keys ? told(keys) : "none: its output is 0"];
  else yield ["keys of the row", `at most ${told(keys)}`];
}

/** The ranks of a sharded plan. */
class Ranks extends Matrix {
  constructor(data, view, batch, head) {
    super(data, batch, head);
    const { ranks } = data;
    this.ranks = ranks;
    this.across = ranks.heads.findIndex(([first, last]) => first <= head && head < last);
    this.rows = owners(ranks.rows);
    this.keys = owners(ranks.keys);
    this.around = ranks.size / ranks.ways;
    this.stages = [];
    ranks.distances.forEach((ends, n) => {
      for (const span of spansOf(ends, 0)) {
        for (let k = 0; k < span.count; k++) this.stages[span.start + k * span.step] = n + 1;
      }
    });
  }

  /** Who computes a row: its owner, or the neighbour that has the head. */
  rankOf(i) {
    const owner = ownerAt(this.rows, i);
    return this.ranks.ways === 1 ? owner : owner - (owner % this.ranks.ways) + this.across;
  }

  /** In which stage a rank has a key, and from whom. */
  source(rank, j) {
    const { ways } = this.ranks, owner = ownerAt(this.keys, j);
    const apart = (Math.floor(rank / ways) - Math.floor(owner / ways) + this.around) % this.around;
    const from = owner - (owner % ways) + (rank % ways);
    return { owner, stage: apart ? this.stages[apart] : 0, from: apart ? from : rank };
  }

  at(i, j) {
    const rank = this.rankOf(i);
    const arrives = this.arrives(rank, j);
    return { i, j, ...this.mask(i, j), rank, row_owner: ownerAt(this.rows, i), arrives, ...this.source(rank, j) };
  }

  /** Whether a rank has a key of another: those that its rows see, where it fetches these only. */
  arrives(rank, j) {
    const { wanted, ways } = this.ranks;
    const { stage } = this.source(rank, j);
    return !stage || !wanted || spansOf(wanted[Math.floor(rank / ways)], 0).some((span) => placeIn(span, j) >= 0);
  }

  colour(rank, stage) {
    return shade(COLOURS[rank % COLOURS.length], Math.min(stage, 3) * 0.2);
  }

  row(i, from, to, emit) {
    const rank = this.rankOf(i);
    this.allowed.at(i, (patch, u) => {
      patch.runs(u, from, to, (a, b, share) => {
        let left = Math.max(a, from);
        const right = Math.min(b, to);
        let k = Math.max(0, lastAt(this.keys.length, (n) => this.keys[n][0], left));
        for (; left < right && k < this.keys.length; k++) {
          const stop = Math.min(right, this.keys[k][1]);
          emit(left, stop, share, this.colour(rank, this.source(rank, left).stage));
          left = stop;
        }
      });
    });
  }

  label(i, j) {
    const { rank, stage } = this.at(i, j);
    return [`r${rank}`, `s${stage}`];
  }

  *tell(i, j) {
    const { allowed, keys, sure, rank, row_owner, stage, from, owner, arrives } = this.at(i, j);
    yield* tellMask(this, i, j, allowed, keys, sure);
    const turned = this.ranks.ways > 1;
    yield ["row of", turned && row_owner !== rank ? `rank ${row_owner}; heads are split, so rank ${rank} computes it` : `rank ${rank}`];
    const own = owner === rank ? "its own key" : `key of rank ${owner}, exchanged for heads`;
    if (!stage) yield ["stage 0", own];
    else if (arrives) yield [`stage ${stage}`, `the key comes from rank ${from}${from === owner ? "" : ` (it was with rank ${owner})`}`];
    else yield ["the key", `stays with rank ${owner}: no row of rank ${rank} sees it`];
    if (allowed && !arrives) yield ["but", "the row sees it, so the plan is wrong"];
  }

  *legend() {
    const count = Math.min(COLOURS.length, this.ranks.size);
    for (let k = 0; k < count; k++) {
      yield [COLOURS[k], `rank ${k}${k + COLOURS.length < this.ranks.size ? ` and each ${COLOURS.length}th after it` : ""}`];
    }
    if (this.stages.length) yield [shade(COLOURS[0], 0.4), "paler: a later stage"];
  }
}

/** The ranges of all ranks in order: [start, stop, rank]. */
function owners(ranks) {
  const every = ranks.flatMap((ends, rank) => spansOf(ends, 0).map((span) => [span.start, span.start + span.count, rank]));
  return every.sort((a, b) => a[0] - b[0]);
}

function ownerAt(every, position) {
  return every[lastAt(every.length, (k) => every[k][0], position)][2];
}
