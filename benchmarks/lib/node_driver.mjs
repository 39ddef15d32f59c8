// The subcommands of a driver that runs on Node.js; benchmarks/node.py copies this file beside driver.mjs, and
// benchmarks/peer.py says what each has to do.
//
// A peer hands `main` an object:
//   setup(url)                            make the schema and bench_orders, idempotent
//   producer(url, connections)            -> {single(task, payload), bulk(task, payloads), transaction(note),
//                                             warm(), which opens a connection, close()}
//   worker(url, concurrency, jobs)        -> resolves when it serves; `jobs` has noop() and stamp(ns)
// Concurrency of producers is promises over a pool of as many connections, in this one process.

import { randomBytes } from "node:crypto";
import { openSync, writeSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";

const BATCH = 1000;
const STAMPING_CLIENTS = 4;

export const ORDERS =
  "CREATE TABLE IF NOT EXISTS bench_orders (id bigint GENERATED ALWAYS AS IDENTITY, note text)";

/** The wall clock in ns since the epoch, with the resolution of µs; a string, as a JSON number has 53 bits. */
function now() {
  return BigInt(Math.round((performance.timeOrigin + performance.now()) * 1000)) * 1000n;
}

let stamps = null;
const jobs = {
  noop() {},
  stamp(ns) {
    const late = now() - BigInt(ns);
    stamps ??= openSync(process.env.BENCH_STAMPS, "a");
    writeSync(stamps, `${late}\n`);
  },
};

/** Text that does not compress. */
function textOf(size) {
  return randomBytes(Math.ceil((size * 3) / 4)).toString("base64").slice(0, size);
}

async function fill(peer, url, { count, size }) {
  const producer = await peer.producer(url, 1);
  const batch = new Array(BATCH).fill(size ? { text: textOf(size) } : {});
  await producer.warm();
  const started = performance.now();
  for (let left = count; left > 0; left -= BATCH) {
    await producer.bulk("noop", left < BATCH ? batch.slice(0, left) : batch);
  }
  const seconds = (performance.now() - started) / 1000;
  await producer.close();
  return { jobs: count, seconds };
}

async function enqueue(peer, url, { mode, clients, seconds }) {
  const producer = await peer.producer(url, clients);
  const batch = new Array(BATCH).fill({});
  const calls = {
    single: () => producer.single("noop", {}),
    bulk: (jobs) => producer.bulk("noop", jobs),
    transaction: () => producer.transaction("an order"),
  };
  const once = () => calls[mode](batch);
  const perCall = mode === "bulk" ? BATCH : 1;
  await together(clients, () => calls[mode](batch.slice(0, 1))); // opens the connections
  let done = 0;
  const started = performance.now();
  const end = started + seconds * 1000;
  await together(clients, async () => {
    while (performance.now() < end) {
      await once();
      done += perCall;
    }
  });
  const took = (performance.now() - started) / 1000;
  await producer.close();
  return { jobs: done, seconds: took, client_side: `1 process × ${clients} promises` };
}

/** An absolute schedule, shared out among a few clients; the stamp is the time of the call itself. */
async function produce(peer, url, { rate, seconds }) {
  const clients = Math.max(1, Math.min(STAMPING_CLIENTS, Math.floor(rate)));
  const producer = await peer.producer(url, clients);
  await together(clients, () => producer.warm());
  const total = Math.max(1, Math.floor(rate * seconds));
  let behind = 0;
  const started = performance.now() + 100;
  await together(clients, async (_, client) => {
    for (let slot = client; slot < total; slot += clients) {
      const due = started + (slot * 1000) / rate;
      const wait = due - performance.now();
      if (wait > 0) await sleep(Math.ceil(wait)); // a millisecond late at most, and no busy waiting
      behind = Math.max(behind, performance.now() - due);
      await producer.single("stamp", { ns: String(now()) });
    }
  });
  const took = (performance.now() - started) / 1000;
  await producer.close();
  return { jobs: total, seconds: took, behind_ms: behind };
}

function together(count, run) {
  return Promise.all(Array.from({ length: count }, run));
}

// An order and its job in one transaction of a connection from the pool.
export async function withOrder(pool, note, enqueue) {
  const client = await pool.connect();
  try {
    await client.query("BEGIN");
    await client.query("INSERT INTO bench_orders (note) VALUES ($1)", [note]);
    await enqueue(client);
    await client.query("COMMIT");
    client.release();
  } catch (error) {
    client.release(error);
    throw error;
  }
}

export async function main(peer) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      jobs: { type: "string", default: "1000" },
      size: { type: "string", default: "0" },
      mode: { type: "string", default: "single" },
      clients: { type: "string", default: "1" },
      seconds: { type: "string", default: "5" },
      rate: { type: "string", default: "100" },
      concurrency: { type: "string", default: String(peer.concurrency) },
      history: { type: "string", default: peer.history },
    },
  });
  const url = process.env.BENCH_URL;
  const number = (name) => Number(values[name]);
  let result;
  switch (positionals[0]) {
    case "setup":
      await peer.setup(url);
      result = {};
      break;
    case "fill":
      result = await fill(peer, url, { count: number("jobs"), size: number("size") });
      break;
    case "enqueue":
      result = await enqueue(peer, url, {
        mode: values.mode,
        clients: number("clients"),
        seconds: number("seconds"),
      });
      break;
    case "produce":
      result = await produce(peer, url, { rate: number("rate"), seconds: number("seconds") });
      break;
    case "worker":
      if (values.history !== peer.history) {
        console.log(JSON.stringify({ unsupported: `history is always ${peer.history} here` }));
        return;
      }
      await peer.worker(url, number("concurrency"), jobs);
      console.log("ready");
      return; // the worker's own handles keep the process until SIGTERM
    default:
      console.error("usage: driver.mjs setup|fill|enqueue|produce|worker [options]");
      process.exit(2);
  }
  console.log(JSON.stringify(result));
}
