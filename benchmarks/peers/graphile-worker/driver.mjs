// graphile-worker with the settings of its authors' performance page; see benchmarks/lib/node_driver.mjs.

import pg from "pg";
import { ORDERS, main, withOrder } from "./node_driver.mjs";

process.env.NO_LOG_SUCCESS = "1"; // read when the package loads; its own performance test sets it as well
const { Logger, makeWorkerUtils, run } = await import("graphile-worker");

const quiet = new Logger(() => (level, message) => {
  if (level === "error" || level === "warning") console.error(message);
});

function connect(url, connections) {
  const pool = new pg.Pool({ connectionString: url, max: connections });
  const tell = (error) => console.error(error); // the package warns of pools without handlers
  pool.on("error", tell);
  pool.on("connect", (client) => client.on("error", tell));
  return pool;
}

await main({
  concurrency: 24,
  history: "off",

  async setup(url) {
    const pool = connect(url, 1);
    const utils = await makeWorkerUtils({ pgPool: pool, logger: quiet });
    await utils.migrate();
    await pool.query(ORDERS);
    await utils.release();
    await pool.end();
  },

  async producer(url, connections) {
    const pool = connect(url, connections);
    const utils = await makeWorkerUtils({ pgPool: pool, logger: quiet });
    return {
      single: (task, payload) => utils.addJob(task, payload),
      bulk: (task, payloads) => utils.addJobs(payloads.map((payload) => ({ identifier: task, payload }))),
      warm: () => pool.query("SELECT 1"),
      transaction: (note) =>
        withOrder(pool, note, (client) => client.query("SELECT graphile_worker.add_job('noop', '{}')")),
      async close() {
        await utils.release();
        await pool.end();
      },
    };
  },

  async worker(url, concurrency, jobs) {
    const runner = await run({
      preset: {
        worker: {
          connectionString: url,
          concurrentJobs: concurrency,
          maxPoolSize: concurrency + 1,
          localQueue: { size: 500 },
          completeJobBatchDelay: 0,
          failJobBatchDelay: 0,
        },
      },
      logger: quiet,
      taskList: {
        noop: () => jobs.noop(),
        stamp: ({ ns }) => jobs.stamp(ns),
      },
    });
    await listening(runner.events);
  },
});

/** Resolves when LISTEN is in force: the client runs its queries in turn. */
function listening(events) {
  return new Promise((resolve, reject) => {
    events.once("pool:listen:success", ({ client }) =>
      setImmediate(() => client.query("SELECT 1").then(resolve, reject)),
    );
  });
}
