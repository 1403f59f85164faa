// An OpenID provider: machines get JWTs for themselves, people sign in on its development pages,
// where any name and any password do and the name becomes `sub`.
import { createServer } from 'node:http';
import { generateKeyPair, exportJWK } from 'jose';
import Provider from 'oidc-provider';

const { ISSUER, HOST, PORT, MACHINE, SECRET, PUBLIC, AUDIENCE, SECONDS } = process.env;
const { privateKey } = await generateKeyPair('RS256', { extractable: true });
const key = { ...(await exportJWK(privateKey)), use: 'sig', alg: 'RS256', kid: `test-${Date.now()}` };

const DEVICE = 'urn:ietf:params:oauth:grant-type:device_code';
const RS256 = { sign: { alg: 'RS256' } };
// What a client may say of itself beside what is usual: seconds, and that it is a gateway, which
// gets a refresh token though it asks for no consent.
const OWN = [
  'access_seconds', 'id_seconds', 'refresh_seconds', 'device_seconds', 'poll_seconds', 'gateway',
];
const own = (name, otherwise) => (_context, _token, client) => client?.[name] ?? otherwise;
const accessSeconds = own('access_seconds', Number(SECONDS));

const provider = new Provider(ISSUER, {
  jwks: { keys: [key] },
  cookies: { keys: ['only-for-tests'] },
  clients: [{
    client_id: MACHINE,
    client_secret: SECRET,
    redirect_uris: [],
    response_types: [],
    grant_types: ['client_credentials'],
  }, { // of a native client the port of a loopback address is not compared (RFC 8252, 7.3)
    client_id: PUBLIC,
    application_type: 'native',
    token_endpoint_auth_method: 'none',
    redirect_uris: ['http://127.0.0.1/callback', 'http://localhost/callback'],
    response_types: ['code'],
    grant_types: ['authorization_code', 'refresh_token', DEVICE],
  }],
  extraClientMetadata: { properties: OWN },
  scopes: ['openid', 'offline_access', 'profile', 'email', 'groups', 'api'],
  claims: {
    openid: ['sub'],
    email: ['email', 'email_verified'],
    profile: ['name', 'preferred_username'],
    groups: ['groups'],
  },
  conformIdTokenClaims: false, // what a scope grants is in the ID token too, as with most
  findAccount: (_context, sub) => ({
    accountId: sub,
    claims: () => ({
      sub,
      email: `${sub}@example.com`,
      email_verified: true,
      name: sub,
      preferred_username: sub,
      groups: sub.startsWith('admin') ? ['llm-admins', 'llm-users'] : ['llm-users'],
    }),
  }),
  pkce: { required: (_context, client) => client.applicationType === 'native' },
  rotateRefreshToken: true, // one that comes a second time ends all that came of the first
  issueRefreshToken: (_context, client, code) =>
    client.grantTypeAllowed('refresh_token') &&
    (client.gateway || code.scopes.has('offline_access')),
  expiresWithSession: () => false,
  ttl: {
    AccessToken: (context, token, client) =>
      token.resourceServer?.accessTokenTTL ?? accessSeconds(context, token, client),
    IdToken: own('id_seconds', Number(SECONDS)),
    RefreshToken: own('refresh_seconds', 3600),
    DeviceCode: own('device_seconds', 300),
    AuthorizationCode: 60,
    ClientCredentials: Number(SECONDS),
    Grant: 86400,
    Session: 86400,
    Interaction: 600,
  },
  features: {
    devInteractions: { enabled: true },
    clientCredentials: { enabled: true },
    deviceFlow: { enabled: true },
    introspection: { enabled: true },
    registration: { enabled: true },
    revocation: { enabled: true },
    resourceIndicators: { // without a resource there are no JWTs
      enabled: true,
      defaultResource: (_context, client) => (client.clientId === MACHINE ? AUDIENCE : undefined),
      useGrantedResource: () => true,
      getResourceServerInfo: (context, resource, client) => ({
        scope: 'openid offline_access email groups api',
        audience: resource,
        accessTokenFormat: 'jwt',
        accessTokenTTL: accessSeconds(context, undefined, client),
        jwt: RS256,
      }),
    },
  },
});

// It sends neither `interval` nor `slow_down`, which are optional.
const asked = new Map();
provider.use(async (context, next) => {
  await next();
  const interval = context.oidc?.client?.poll_seconds ?? 1;
  if (context.path === '/device/auth' && context.status === 200) {
    context.body = { ...context.body, interval };
  }
  if (context.path === '/token' && context.body?.error === 'authorization_pending') {
    const code = context.oidc.params.device_code;
    const now = Date.now();
    if (now - (asked.get(code) ?? 0) < interval * 900) context.body = { error: 'slow_down' };
    asked.set(code, now);
  }
});

const answer = provider.callback();
createServer((request, response) => {
  request.headers.host = new URL(ISSUER).host; // also where another stands before it
  answer(request, response);
}).listen(Number(PORT), HOST);
