// pg-boss whose handlers take 1,000 jobs at once, woken by NOTIFY; see benchmarks/lib/node_driver.mjs.

import pg from "pg";
import { PgBoss } from "pg-boss";
import { ORDERS, main, withOrder } from "./node_driver.mjs";

const QUEUES = ["noop", "stamp"];

function boss(url, options) {
  const made = new PgBoss({ connectionString: url, ...options });
  made.on("error", (error) => console.error(error));
  return made;
}

const bystander = { supervise: false, schedule: false, migrate: false, registerInstance: false };

await main({
  concurrency: 1,
  history: "on",

  async setup(url) {
    const it = await boss(url, { supervise: false, schedule: false }).start();
    for (const name of QUEUES) await it.createQueue(name, { notify: true });
    await it.stop();
    const client = new pg.Client({ connectionString: url });
    await client.connect();
    await client.query(ORDERS);
    await client.end();
  },

  async producer(url, connections) {
    const it = await boss(url, { ...bystander, max: connections, useListenNotify: false }).start();
    const pool = new pg.Pool({ connectionString: url, max: connections });
    return {
      single: (task, payload) => it.send(task, payload),
      bulk: (task, payloads) => it.insert(task, payloads.map((data) => ({ data }))),
      warm: () => it.getDb().executeSql("SELECT 1"),
      transaction: (note) =>
        withOrder(pool, note, (client) =>
          it.send("noop", {}, { db: { executeSql: (text, values) => client.query(text, values) } }),
        ),
      async close() {
        await it.stop();
        await pool.end();
      },
    };
  },

  async worker(url, concurrency, jobs) {
    const it = await boss(url, { useListenNotify: true }).start();
    const options = { batchSize: 1000, burstWhenBatchFull: true, localConcurrency: concurrency };
    await it.work("noop", options, async (batch) => {
      for (const _ of batch) jobs.noop();
    });
    await it.work("stamp", options, async (batch) => {
      for (const { data } of batch) jobs.stamp(data.ns);
    });
    process.once("SIGTERM", () => it.stop({ graceful: true }).then(() => process.exit(0)));
  },
});
