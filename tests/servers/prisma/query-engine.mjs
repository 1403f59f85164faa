#!/usr/bin/env node
// Stand-in for Prisma's native `query-engine` program, for tests only.
//
// prisma-client-py starts `query-engine -p PORT` and posts GraphQL to it. The native program is
// not in any package registry, but Prisma publishes the same engine on npm as WebAssembly
// (@prisma/query-engine-wasm); that one speaks a JSON protocol and takes a JavaScript driver.
// This file translates: HTTP and GraphQL in, JSON protocol to the engine, plain values out.
// LiteLLM, prisma-client-py, the engine and PostgreSQL are the real ones.
import fs from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import { PrismaPg } from '@prisma/adapter-pg';
import { bindAdapter } from '@prisma/driver-adapter-utils';
import { parse } from 'graphql';
import pg from 'pg';
import { parse as parseArray } from 'postgres-array';

const VERSION = '393aa359c9ad4a4bb28630fb5613f9c281cde053';
const argv = process.argv.slice(2);
if (argv.includes('--version')) {
  console.log(`query-engine ${VERSION}`);
  process.exit(0);
}
const port = Number(argv[argv.indexOf('-p') + 1]);
const schema = fs.readFileSync(process.env.PRISMA_DML_PATH, 'utf8');

// --- driver ------------------------------------------------------------------------------------
// adapter-pg does not know PostgreSQL's internal string types, such as pg_views.viewname's.
const TEXT = 25, TEXT_ARRAY = 1009, NAME_ARRAY = 1003;
const INTERNAL = new Set([18, 19, 2205, 2278]); // "char", name, regclass, void
const queryable = Object.getPrototypeOf(PrismaPg.prototype);
const { performIO } = queryable;
queryable.performIO = async function (request) {
  const result = await performIO.call(this, request);
  if (!result.ok) return result;
  result.value.fields?.forEach((field, i) => {
    if (INTERNAL.has(field.dataTypeID)) field.dataTypeID = TEXT;
    if (field.dataTypeID !== NAME_ARRAY) return;
    field.dataTypeID = TEXT_ARRAY;
    for (const row of result.value.rows) {
      if (typeof row[i] === 'string') row[i] = parseArray(row[i]);
    }
  });
  return result;
};

function databaseUrl() {
  let url = process.env.DATABASE_URL;
  const overwrite = process.env.OVERWRITE_DATASOURCES; // JSON, or that in base64
  if (overwrite) {
    const plainly = overwrite.startsWith('[');
    const text = plainly ? overwrite : Buffer.from(overwrite, 'base64').toString();
    url = JSON.parse(text)[0]?.url ?? url;
  }
  return new URL(url);
}

// Prisma's own parameters, which the driver would pass on to PostgreSQL.
const PRISMA_PARAMETERS = [
  'connection_limit', 'pool_timeout', 'schema', 'pgbouncer', 'socket_timeout', 'connect_timeout',
  'statement_cache_size',
];

const url = databaseUrl();
const limit = Number(url.searchParams.get('connection_limit') || 10);
for (const name of PRISMA_PARAMETERS) url.searchParams.delete(name);
const pool = new pg.Pool({ connectionString: url.toString(), max: Math.min(limit, 20) });
pool.on('error', () => {}); // an idle connection was lost; the next query opens another
const adapter = bindAdapter(new PrismaPg(pool));

// --- engine ------------------------------------------------------------------------------------
async function newEngine() {
  const require = createRequire(import.meta.url);
  const manifest = require.resolve('@prisma/query-engine-wasm/package.json');
  const folder = manifest.replace(/package\.json$/, 'postgresql/');
  const module = await WebAssembly.compile(fs.readFileSync(`${folder}query_engine_bg.wasm`));
  // an ES module in a package that does not say so: a data: URL loads it as one
  const source = fs.readFileSync(`${folder}query_engine_bg.js`).toString('base64');
  const glue = await import(`data:text/javascript;base64,${source}`);
  const instance = await WebAssembly.instantiate(module, { './query_engine_bg.js': glue });
  glue.__wbg_set_wasm(instance.exports);
  const generator = `generator client {
    provider = "prisma-client-js"
    previewFeatures = ["driverAdapters"]
  }`;
  const datamodel = schema.replace(/generator\s+\w+\s*\{[^}]*\}/, generator);
  const options = { datamodel, logLevel: 'error', logQueries: false };
  const engine = new glue.QueryEngine(options, () => {}, adapter);
  await engine.connect('{}');
  return engine;
}

// A driver's exception comes out as P2036 with a number. The native engine says P1001 (cannot
// reach) or P1017 (closed), which is how LiteLLM tells an outage from a key it does not know.
function asNative(error) {
  const facing = error.user_facing_error;
  if (facing?.error_code !== 'P2036') return error;
  const cause = adapter.errorRegistry.consumeError(facing.meta?.id)?.error;
  const meta = { database_host: url.hostname, database_port: Number(url.port || 5432) };
  const where = `\`${meta.database_host}\`:\`${meta.database_port}\``;
  const unreachable = ['ECONNREFUSED', 'ENOTFOUND', 'ETIMEDOUT'].includes(cause?.code);
  const message = unreachable
    ? `Can't reach database server at ${where}\n\n`
      + `Please make sure your database server is running at ${where}.`
    : 'Server has closed the connection.';
  const error_code = unreachable ? 'P1001' : 'P1017';
  return {
    error: String(cause?.message ?? error.error),
    user_facing_error: { is_panic: false, message, meta, error_code },
  };
}

// --- GraphQL to JSON protocol -------------------------------------------------------------------
// Written as text, so that big integers keep their digits. `model` is the model whose fields the
// names are; `json` is true inside the value of a Json field: the native engine reads a string
// there as JSON text, the JSON protocol wants it tagged.
const FIELDS = {}; // model -> field -> type
for (const [, model, body] of schema.replace(/\/\/.*$/gm, '')
  .matchAll(/^\s*model\s+(\w+)\s*\{([^]*?)^\s*\}/gm)) {
  const lines = body.matchAll(/^\s*(\w+)\s+(\w+)/gm);
  FIELDS[model] = Object.fromEntries([...lines].map(([, name, type]) => [name, type]));
}
const JSON_FILTER = new Set([
  'path', 'mode', 'string_contains', 'string_starts_with', 'string_ends_with',
]);

function value(node, model, json) {
  switch (node.kind) {
    case 'IntValue':
    case 'FloatValue':
      return node.value;
    case 'StringValue': {
      const text = JSON.stringify(node.value);
      return json ? `{"$type":"Json","value":${text}}` : text;
    }
    case 'EnumValue':
      return JSON.stringify(node.value);
    case 'BooleanValue':
      return String(node.value);
    case 'NullValue':
      return 'null';
    case 'ListValue':
      return `[${node.values.map((each) => value(each, model, json)).join(',')}]`;
    case 'ObjectValue':
      return object(node.fields, model, json);
    default:
      throw new Error(`unsupported GraphQL value ${node.kind}`);
  }
}

function object(fields, model, json) {
  const members = fields.map((field) => {
    const name = field.name.value;
    const type = json ? undefined : FIELDS[model]?.[name];
    const inside = json ? !JSON_FILTER.has(name) : type === 'Json';
    return `${JSON.stringify(name)}:${value(field.value, FIELDS[type] ? type : model, inside)}`;
  });
  return `{${members.join(',')}}`;
}

function selection(set, model) {
  const members = (set?.selections ?? []).map((field) => {
    const name = field.name.value;
    const type = FIELDS[model]?.[name];
    const nested = field.selectionSet || field.arguments?.length;
    return `${JSON.stringify(name)}:${nested ? query(field, FIELDS[type] ? type : model) : 'true'}`;
  });
  return `{${members.join(',')}}`;
}

function query(field, model) {
  const given = object(field.arguments ?? [], model);
  return `{"arguments":${given},"selection":${selection(field.selectionSet, model)}}`;
}

// longer names first: createManyAndReturn is not createMany
const ACTIONS = [
  'createManyAndReturn', 'findUnique', 'findFirst', 'findMany', 'createOne', 'createMany',
  'updateOne', 'updateMany', 'deleteOne', 'deleteMany', 'upsertOne', 'aggregate', 'groupBy',
  'queryRaw', 'executeRaw',
];

function toJsonProtocol(graphql) {
  const [field] = parse(graphql).definitions[0].selectionSet.selections;
  const name = field.name.value;
  const action = ACTIONS.find((each) => name.startsWith(each));
  if (!action) throw new Error(`unsupported operation ${name}`);
  const orThrow = name.endsWith('OrThrow') ? 'OrThrow' : '';
  const model = name.slice(action.length, name.length - orThrow.length);
  const named = model ? `"modelName":${JSON.stringify(model)},` : '';
  return `{${named}"action":"${action}${orThrow}","query":${query(field, model)}}`;
}

// --- JSON protocol to GraphQL's answer ----------------------------------------------------------
function plain(x) {
  if (Array.isArray(x)) return x.map(plain);
  if (!x || typeof x !== 'object') return x;
  if ('$type' in x) return x.value;
  return Object.fromEntries(Object.entries(x).map(([name, each]) => [name, plain(each)]));
}

// prisma-client-py 0.11 wants each cell of a raw query with its type.
function cell(type, x) {
  if (x === null) return { prisma__type: 'null', prisma__value: null };
  if (!type.endsWith('-array')) return { prisma__type: type, prisma__value: x };
  const of = type.slice(0, -'-array'.length);
  return { prisma__type: 'array', prisma__value: x.map((each) => cell(of, each)) };
}

function rows(x) {
  const raw = x?.columns && x.types && x.rows && Object.keys(x).length === 3;
  if (!raw) return x;
  const named = (row) => row.map((each, i) => [x.columns[i], cell(x.types[i], each)]);
  return x.rows.map((row) => Object.fromEntries(named(row)));
}

function result(answer) {
  if (answer.errors) return { errors: answer.errors.map(asNative) };
  return { data: { result: rows(plain(Object.values(answer.data)[0])) } };
}

function transaction(text) {
  const answer = JSON.parse(text || '{}');
  const failed = answer?.error_code;
  return failed ? { errors: [{ error: answer.message, user_facing_error: answer }] } : answer;
}

// --- server -------------------------------------------------------------------------------------
const engine = await newEngine();

async function answer(path, headers, body) {
  if (path === '/status') return { status: 'ok' };
  if (path === '/metrics') return { counters: [], gauges: [], histograms: [] };
  if (path === '/transaction/start') return transaction(await engine.startTransaction(body, '{}'));
  const [, number, end] = path.match(/^\/transaction\/([^/]+)\/(commit|rollback)$/) ?? [];
  if (end === 'commit') return transaction(await engine.commitTransaction(number, '{}'));
  if (end === 'rollback') return transaction(await engine.rollbackTransaction(number, '{}'));
  const within = headers['x-transaction-id'];
  const asked = JSON.parse(body);
  if (!asked.batch) {
    return result(JSON.parse(await engine.query(toJsonProtocol(asked.query), '{}', within)));
  }
  const batch = asked.batch.map((each) => toJsonProtocol(each.query)).join(',');
  const together = asked.transaction ? ',"transaction":{}' : '';
  const done = JSON.parse(await engine.query(`{"batch":[${batch}]${together}}`, '{}', within));
  if (done.batchResult) return { batchResult: done.batchResult.map(result) };
  return { errors: (done.errors ?? []).map(asNative) };
}

function failure(error) {
  const message = String(error?.message ?? error);
  const facing = { is_panic: false, message, backtrace: null };
  return { errors: [{ error: message, user_facing_error: facing }] };
}

http.createServer(async (request, response) => {
  const parts = [];
  for await (const part of request) parts.push(part);
  const body = Buffer.concat(parts).toString();
  const path = request.url.split('?')[0];
  const said = await answer(path, request.headers, body).catch(failure);
  response.writeHead(200, { 'content-type': 'application/json' });
  response.end(JSON.stringify(said));
}).listen(port, '127.0.0.1');

for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(0));
// a proxy that was killed cannot stop its engine
const parent = process.ppid;
setInterval(() => process.ppid === parent || process.exit(0), 1000).unref();
