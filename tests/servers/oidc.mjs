// An OpenID provider whose one client gets access tokens that are JWTs, for itself.
import { createServer } from 'node:http';
import { generateKeyPair, exportJWK } from 'jose';
import Provider from 'oidc-provider';

const { ISSUER, PORT, CLIENT, SECRET, AUDIENCE, SECONDS } = process.env;
const { privateKey } = await generateKeyPair('RS256', { extractable: true });
const key = { ...(await exportJWK(privateKey)), use: 'sig', alg: 'RS256', kid: 'test' };

const provider = new Provider(ISSUER, {
  jwks: { keys: [key] },
  clients: [{
    client_id: CLIENT,
    client_secret: SECRET,
    redirect_uris: [],
    response_types: [],
    grant_types: ['client_credentials'],
  }],
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: { // without a resource there are no JWTs
      enabled: true,
      defaultResource: () => AUDIENCE,
      getResourceServerInfo: (_context, resource) => ({
        scope: '',
        audience: resource,
        accessTokenFormat: 'jwt',
        accessTokenTTL: Number(SECONDS),
        jwt: { sign: { alg: 'RS256' } },
      }),
    },
  },
});

createServer(provider.callback()).listen(Number(PORT), '127.0.0.1');
