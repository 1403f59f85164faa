"""
A web application firewall before a gateway: nginx with ModSecurity and its core rule set.

All of it is Debian's own, as it comes, with the rules switched on. It answers 403 and a page.

See: https://coreruleset.org/docs/
"""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from tests.servers.install import NotInstalledError
from tests.servers.processes import Child, Port

_MODULE = Path("/usr/lib/nginx/modules/ngx_http_modsecurity_module.so")
_SETUP = Path("/etc/modsecurity/crs/crs-setup.conf")
_RULES = Path("/usr/share/modsecurity-crs/rules")
_ENGINE = """\
SecRuleEngine On
SecRequestBodyAccess On
SecRequestBodyLimit 13107200
SecRequestBodyNoFilesLimit 1310720
SecResponseBodyAccess Off
SecRule REQUEST_HEADERS:Content-Type "^application/json" \
  "id:200001,phase:1,t:none,t:lowercase,pass,nolog,ctl:requestBodyProcessor=JSON"
"""
_NGINX = """\
daemon off;
master_process off;
pid {work}/nginx.pid;
error_log {work}/error.log;
load_module {module};
events {{ }}
http {{
  access_log off;
  client_max_body_size 32m;
  client_body_temp_path {work}/body;
  proxy_temp_path {work}/proxy;
  fastcgi_temp_path {work}/fastcgi;
  uwsgi_temp_path {work}/uwsgi;
  scgi_temp_path {work}/scgi;
  server {{
    listen 127.0.0.1:{port};
    modsecurity on;
    modsecurity_rules_file {work}/rules.conf;
    location / {{
      proxy_pass {behind};
      proxy_buffering off;
      proxy_http_version 1.1;
    }}
    {exempt}
  }}
}}
"""
# What its administrator is asked for.
_EXEMPT = """
    location /v1/messages {{
      modsecurity off;
      proxy_pass {behind};
      proxy_buffering off;
      proxy_http_version 1.1;
    }}
"""


class Waf:
    """
    The firewall, as a context.

    Args:
        behind: The gateway's address.
        exempt: Leave `/v1/messages` out.
    """

    def __init__(self, behind: str, *, exempt: bool = False) -> None:
        self._behind, self._exempt = behind, exempt
        self._stack = ExitStack()
        self.url = ""

    def __enter__(self) -> Self:
        program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None or not _MODULE.exists() or not _SETUP.exists():
            raise NotInstalledError("nginx, ModSecurity or its rules are missing: tests/setup.sh")
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="keybroker-waf-")))
            port = stack.enter_context(Port()).number
            includes = "".join(
                f"Include {one}\n" for one in (_SETUP, *sorted(_RULES.glob("*.conf")))
            )
            (work / "rules.conf").write_text(_ENGINE + includes)
            exempt = _EXEMPT.format(behind=self._behind) if self._exempt else ""
            config = work / "nginx.conf"
            config.write_text(
                _NGINX.format(
                    work=work, module=_MODULE, port=port, behind=self._behind, exempt=exempt
                )
            )
            child = stack.enter_context(
                Child(
                    [program, "-p", str(work), "-c", str(config), "-e", str(work / "error.log")],
                    log=work / "nginx.log",
                    environment={"PATH": os.defpath},
                )
            )
            self.url = f"http://127.0.0.1:{port}"
            child.wait_until(self._answers, 30)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=5)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            connection.getresponse().read()
            return True
        return False
