#!/usr/bin/env node
// Stand-in for Prisma's native `query-engine` program, for tests only.
//
// prisma-client-py starts `query-engine -p PORT` and posts GraphQL to it. The native program is
// not in any package registry, but Prisma publishes the same engine on npm as WebAssembly
// (@prisma/query-engine-wasm); that one speaks a JSON protocol and takes a JavaScript driver.
// This file translates: HTTP and GraphQL in, JSON protocol to the engine, plain values out.
// LiteLLM, prisma-client-py, the engine and PostgreSQL are the real ones.
import http from 'node:http';
import fs from 'node:fs';
import { createRequire } from 'node:module';
import { parse } from 'graphql';
import pg from 'pg';
import { parse as parseArray } from 'postgres-array';
import { PrismaPg } from '@prisma/adapter-pg';
import { bindAdapter } from '@prisma/driver-adapter-utils';

const require = createRequire(import.meta.url);
const VERSION = '393aa359c9ad4a4bb28630fb5613f9c281cde053';
const argv = process.argv.slice(2);
if (argv.includes('--version')) { console.log(`query-engine ${VERSION}`); process.exit(0); }
const port = Number(argv[argv.indexOf('-p') + 1]);
const schemaPath = process.env.PRISMA_DML_PATH;

// adapter-pg has no mapping for PostgreSQL's internal string types (pg_views.viewname is `name`)
const queryable = Object.getPrototypeOf(PrismaPg.prototype);
const performIO = queryable.performIO;
queryable.performIO = async function (q) {
  const r = await performIO.call(this, q);
  if (r.ok) r.value.fields?.forEach((f, i) => {
    if (f.dataTypeID === 1003) { // name[]
      f.dataTypeID = 1009;
      for (const row of r.value.rows) if (typeof row[i] === 'string') row[i] = parseArray(row[i]);
    } else if ([18, 19, 2205, 2278].includes(f.dataTypeID)) f.dataTypeID = 25; // "char", name, regclass, void
  });
  return r;
};

// --- wasm engine -----------------------------------------------------------------------------
let registry;
let address;
// a JS driver's own exception comes out as P2036 with an id; the native engine reports P1001/P1017
function native(e) {
  const u = e.user_facing_error;
  if (u?.error_code !== 'P2036') return e;
  const cause = registry?.consumeError(u.meta?.id)?.error;
  const message = cause?.code === 'ECONNREFUSED' || cause?.code === 'ENOTFOUND' || cause?.code === 'ETIMEDOUT'
    ? `Can't reach database server at \`${address.database_host}\`:\`${address.database_port}\`\n\nPlease make sure your database server is running at \`${address.database_host}\`:\`${address.database_port}\`.`
    : 'Server has closed the connection.';
  const error_code = message.startsWith('Can') ? 'P1001' : 'P1017';
  return { error: String(cause?.message ?? e.error), user_facing_error: { is_panic: false, message, meta: address, error_code } };
}
async function newEngine() {
  const dir = require.resolve('@prisma/query-engine-wasm/package.json').replace(/package\.json$/, 'postgresql/');
  const mod = await WebAssembly.compile(fs.readFileSync(dir + 'query_engine_bg.wasm'));
  // the package's .js files are ES modules without "type":"module": load by data: URL
  const glue = await import('data:text/javascript;base64,' + fs.readFileSync(dir + 'query_engine_bg.js').toString('base64'));
  const inst = await WebAssembly.instantiate(mod, { './query_engine_bg.js': glue });
  glue.__wbg_set_wasm(inst.exports);
  let url = process.env.DATABASE_URL;
  if (process.env.OVERWRITE_DATASOURCES) {
    const raw = process.env.OVERWRITE_DATASOURCES;
    const ds = JSON.parse(raw.startsWith('[') ? raw : Buffer.from(raw, 'base64').toString());
    if (ds[0]?.url) url = ds[0].url;
  }
  const u = new URL(url);
  const limit = Number(u.searchParams.get('connection_limit') || 10);
  for (const k of ['connection_limit', 'pool_timeout', 'schema', 'pgbouncer', 'socket_timeout', 'connect_timeout', 'statement_cache_size']) u.searchParams.delete(k);
  const pool = new pg.Pool({ connectionString: u.toString(), max: Math.min(limit, 20) });
  pool.on('error', () => {});
  const datamodel = fs.readFileSync(schemaPath, 'utf8')
    .replace(/generator\s+\w+\s*\{[^}]*\}/, 'generator client {\n provider = "prisma-client-js"\n previewFeatures = ["driverAdapters"]\n}');
  const adapter = bindAdapter(new PrismaPg(pool));
  registry = adapter.errorRegistry;
  address = { database_host: u.hostname, database_port: Number(u.port || 5432) };
  const engine = new glue.QueryEngine({ datamodel, logLevel: 'error', logQueries: false }, () => {}, adapter);
  await engine.connect('{}');
  return engine;
}

// --- schema: which fields are Json, which are relations -----------------------------------------
const SCHEMA = {};
{
  const text = fs.readFileSync(schemaPath, 'utf8').replace(/\/\/.*$/gm, '');
  for (const m of text.matchAll(/^\s*model\s+(\w+)\s*\{([^]*?)^\s*\}/gm)) {
    SCHEMA[m[1]] = Object.fromEntries([...m[2].matchAll(/^\s*(\w+)\s+(\w+)/gm)].map((f) => [f[1], f[2]]));
  }
}
// --- GraphQL -> JSON protocol (as text, so that big integers keep their digits) ----------------
// `model`: the model whose fields the keys name; `json`: inside a Json field's value. The native
// engine reads a string in a Json field as JSON text; the JSON protocol wants that tagged.
const JSON_FILTER = new Set(['path', 'mode', 'string_contains', 'string_starts_with', 'string_ends_with']);
function val(v, model, json) {
  switch (v.kind) {
    case 'IntValue': case 'FloatValue': return v.value;
    case 'StringValue': return json ? `{"$type":"Json","value":${JSON.stringify(v.value)}}` : JSON.stringify(v.value);
    case 'EnumValue': return JSON.stringify(v.value);
    case 'BooleanValue': return String(v.value);
    case 'NullValue': return 'null';
    case 'ListValue': return `[${v.values.map((x) => val(x, model, json)).join(',')}]`;
    case 'ObjectValue': return obj(v.fields, model, json);
    default: throw new Error(`unsupported GraphQL value ${v.kind}`);
  }
}
function obj(fields, model, json) {
  return `{${fields.map((f) => {
    const k = f.name.value;
    const type = json ? undefined : SCHEMA[model]?.[k];
    const j = json ? !JSON_FILTER.has(k) : type === 'Json';
    return `${JSON.stringify(k)}:${val(f.value, SCHEMA[type] ? type : model, j)}`;
  }).join(',')}}`;
}
function selection(set, model) {
  return `{${(set?.selections ?? []).map((s) => {
    const k = s.name.value;
    const t = SCHEMA[model]?.[k];
    const sub = s.selectionSet || s.arguments?.length ? query(s, SCHEMA[t] ? t : model) : 'true';
    return `${JSON.stringify(k)}:${sub}`;
  }).join(',')}}`;
}
const query = (f, model) => `{"arguments":${obj(f.arguments ?? [], model)},"selection":${selection(f.selectionSet, model)}}`;
const ACTIONS = ['createManyAndReturn', 'findUnique', 'findFirst', 'findMany', 'createOne', 'createMany', 'updateOne', 'updateMany',
  'deleteOne', 'deleteMany', 'upsertOne', 'aggregate', 'groupBy', 'queryRaw', 'executeRaw'];
function toJsonProtocol(graphqlText) {
  const f = parse(graphqlText).definitions[0].selectionSet.selections[0];
  const name = f.name.value;
  const action = ACTIONS.find((a) => name.startsWith(a));
  if (!action) throw new Error(`unsupported operation ${name}`);
  let model = name.slice(action.length);
  let orThrow = '';
  if (model.endsWith('OrThrow')) { model = model.slice(0, -7); orThrow = 'OrThrow'; }
  const m = model ? `"modelName":${JSON.stringify(model)},` : '';
  return `{${m}"action":"${action}${orThrow}","query":${query(f, model)}}`;
}
// --- JSON protocol -> GraphQL-shaped result ----------------------------------------------------
function plain(x) {
  if (Array.isArray(x)) return x.map(plain);
  if (x && typeof x === 'object') {
    if ('$type' in x) return x.value;
    return Object.fromEntries(Object.entries(x).map(([k, v]) => [k, plain(v)]));
  }
  return x;
}
// prisma-client-py 0.11 (the version LiteLLM is written for) predates the columns/types/rows form
const cell = (t, v) => (v === null ? { prisma__type: 'null', prisma__value: null }
  : t.endsWith('-array') ? { prisma__type: 'array', prisma__value: v.map((e) => cell(t.slice(0, -6), e)) }
  : { prisma__type: t, prisma__value: v });
const raw = (x) => (x && x.columns && x.types && x.rows && Object.keys(x).length === 3
  ? x.rows.map((row) => Object.fromEntries(row.map((v, i) => [x.columns[i], cell(x.types[i], v)]))) : x);
const one = (r) => (r.errors ? { errors: r.errors.map(native) } : { data: { result: raw(plain(Object.values(r.data)[0])) } });

const engine = await newEngine();
const read = (req) => new Promise((ok) => { const c = []; req.on('data', (d) => c.push(d)); req.on('end', () => ok(Buffer.concat(c).toString())); });
http.createServer(async (req, res) => {
  const send = (o, code = 200) => { res.writeHead(code, { 'content-type': 'application/json' }); res.end(JSON.stringify(o)); };
  try {
    const body = await read(req);
    const path = req.url.split('?')[0];
    const tx = path.match(/^\/transaction\/([^/]+)\/(commit|rollback)$/);
    if (path === '/status') return send({ status: 'ok' });
    if (path === '/metrics') return send({ counters: [], gauges: [], histograms: [] });
    if (path === '/transaction/start') return send(wrapTx(JSON.parse(await engine.startTransaction(body, '{}'))));
    if (tx) {
      const r = tx[2] === 'commit' ? await engine.commitTransaction(tx[1], '{}') : await engine.rollbackTransaction(tx[1], '{}');
      return send(wrapTx(JSON.parse(r || '{}')));
    }
    const txId = req.headers['x-transaction-id'];
    const q = JSON.parse(body);
    if (q.batch) {
      const b = `{"batch":[${q.batch.map((i) => toJsonProtocol(i.query)).join(',')}]${q.transaction ? ',"transaction":{}' : ''}}`;
      const r = JSON.parse(await engine.query(b, '{}', txId));
      return send(r.batchResult ? { batchResult: r.batchResult.map(one) } : { errors: (r.errors ?? []).map(native) });
    }
    return send(one(JSON.parse(await engine.query(toJsonProtocol(q.query), '{}', txId))));
  } catch (e) {
    return send({ errors: [{ error: String(e?.message ?? e), user_facing_error: { is_panic: false, message: String(e?.message ?? e), backtrace: null } }] });
  }
}).listen(port, '127.0.0.1');
function wrapTx(r) { return r && r.error_code ? { errors: [{ error: r.message, user_facing_error: r }] } : r; }
for (const s of ['SIGINT', 'SIGTERM']) process.on(s, () => process.exit(0));
// a proxy that was killed cannot stop its engine
const parent = process.ppid;
setInterval(() => { if (process.ppid !== parent) process.exit(0); }, 1000).unref();
