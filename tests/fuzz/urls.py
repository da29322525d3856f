"""URLs made of pieces that URL parsers read differently."""
# ruff: noqa: E501, RUF001  # rows of pieces, and letters that are mistaken for others

from hypothesis import strategies as st

SCHEMES = [
    "https://",
    "http://",
    "HTTPS://",
    "https:/",
    "https:",
    "//",
    "ftp://",
    "file://",
    "https:\\\\",
    "javascript:",
]
USERS = ["", "", "", "", "", "user@", "user:pass@", "@", "good.test@", "good.test:443@", "%40@", "a@b@", "\\@", "#@"]
NAMES = [
    "good.test", "GOOD.test", "api.test", "evil.test", "good.test.", "good.test.evil.test", "evil.test.good.test",
    "localhost", "localhost.", "LOCALHOST", "localtest.me", "gооd.test", "good。test", "xn--gd-jia.test", "good%2etest",
    "good.test%00.evil.test", "good.test\x00", "good .test", "good.test\t", "good.test\r\nHost: evil.test", "ⓛocalhost",
    "１２７.0.0.1", "good_.test", "-good.test", "*.test", "good.test,evil.test", "", ".", "..", "a" * 64 + ".test",
    "metadata.google.internal", "ﬀ.test", "ß.test", "good.test!", "good.test'", "good.test;x", "good.test|x", "[good.test]",
    "mixed.test", "inner.test", "outer.test", "six.test", "rebound.test",
]  # fmt: skip
ADDRESSES = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "0.0.0.0", "0",
    "10.0.0.1", "169.254.169.254", "169.254.43518", "192.168.1.1", "172.31.255.255", "100.100.100.200", "1.1.1.1", "8.8.8.8",
    "93.184.215.14", "224.0.0.1", "255.255.255.255", "256.1.1.1", "1.2.3.4.5", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1%25lo]", "[fe80::1%lo]", "[fc00::1]",
    "[2606:2800:21f:cb07:6820:80da:af6b:8b2c]", "[0:0:0:0:0:0:0:1]", "[::1", "::1", "[v1.x]", "[ff02::1]", "[::1]]", "[[::1]]",
    "168.63.129.16", "127.0.0.1%20", "1.1.1.1%0d%0a", "0x7F.0x0.0x0.0x1", "127.7.7.7", "[2001:db8::1]", "00.0.0.0",
]  # fmt: skip
PORTS = ["", "", "", "", "", ":443", ":80", ":8443", ":0", ":65535", ":65536", ":", ":0443", ":+443", ":-1", ":４４３", ":4 43",
         ":443:80", ":x", ":99999999999999999999", ":5432"]  # fmt: skip
SEGMENTS = [
    "", "a", "..", ".", "%2e%2e", "%2E.", "..;", "...", "a.png", "%", "%zz", "%00", "%2f", "é", "\x00", " ", "\r\n", "\\", "~", "*",
    "api", "v3", "fetch", "12202888", "fine_tune_status", "x" * 300, "a:b", "@", "//", "'", '"', "{}", "+", "&", "﹒﹒", "＃",
]  # fmt: skip
TAILS = [
    "",
    "",
    "",
    "",
    "?",
    "?a=b",
    "#",
    "#x",
    ";p",
    "?key=1#y",
    "/",
    "//",
    "?" + "x" * 9_000,
    "\n",
    " ",
    "\u2028",
    "%0d%0aX: y",
]


GOOD_HOSTS = ["good.test", "outer.test", "rebound.test", "GOOD.test", "1.1.1.1", "[2606:4700:4700::1111]", "mixed.test"]
FETCH_STARTS = ["/api/v3", "/api/v6", "/api/v12", "/api/v6/images", "/api/v1/enterprise/flux"]
FETCH_ENDS = ["/fetch", "/fetch/12202888", "/fetch/12202888", "/fetch/fetch"]
ODD_STARTS = [
    "/api/v",
    "/api",
    "/api/v3/",
    "",
    "/x/api/v3",
    "/api/v3/..",
    "/api/v3/%2e",
    "/api/v3/é",
    "//api/v3",
    "/api/v3/a.b",
]
ODD_ENDS = [
    "/fetch/", "/fetch/12202889", "/FETCH", "/clear_queue", "/fine_tune_status", "/fetch/12202888/x", "/fetch/../clear_queue",
    "/fetch/12202888/../../v1/x", "/fetch/%31", "/fetch;x", "/fetch//12202888", "/prefetch",
]  # fmt: skip
STRANGERS = [
    "https://evil.test", "https://good.test.evil.test", "https://good.test:8443", "http://good.test", "https://api.test",
    "http://127.0.0.1:7002", "https://127.0.0.1", "http://127.1:7001", "https://xgood.test", "http://localhost:7001",
]  # fmt: skip
PIECES = st.sets(st.sampled_from(["scheme", "user", "host", "port", "path", "tail", "struck"]), max_size=3)


@st.composite
def urls(draw: st.DrawFn) -> str:
    """Draw a URL with up to three unusual pieces."""
    odd = draw(PIECES)
    hosts = st.sampled_from(NAMES) | st.sampled_from(ADDRESSES) | st.text(max_size=6) | st.ip_addresses().map(str)
    scheme = draw(st.sampled_from(SCHEMES)) if "scheme" in odd else "https://"
    user = draw(st.sampled_from(USERS)) if "user" in odd else ""
    host = draw(hosts if "host" in odd else st.sampled_from(GOOD_HOSTS))
    port = draw(st.sampled_from(PORTS)) if "port" in odd else ""
    segments = draw(st.lists(st.sampled_from(SEGMENTS), max_size=4)) if "path" in odd else ["a.png"]
    tail = draw(st.sampled_from(TAILS)) if "tail" in odd else ""
    url = scheme + user + host + port + "".join("/" + segment for segment in segments) + tail
    return draw(struck(url)) if "struck" in odd else url


@st.composite
def fetch_urls(draw: st.DrawFn, sites: tuple[str, ...]) -> str:
    """Draw fetch URLs that are valid or almost valid."""
    odd = draw(PIECES)
    site = draw(st.sampled_from(sites))
    if "host" in odd:
        elsewhere = st.sampled_from([*NAMES, *ADDRESSES]).map("https://{}".format)
        site = draw(st.sampled_from(STRANGERS) | elsewhere | urls())
    elif "user" in odd or "scheme" in odd:
        scheme, _, authority = site.partition("://")
        scheme = draw(st.sampled_from(SCHEMES)) if "scheme" in odd else f"{scheme}://"
        site = scheme + (draw(st.sampled_from(USERS)) if "user" in odd else "") + authority
    if "port" in odd:
        site += draw(st.sampled_from(PORTS))
    start, end = draw(st.sampled_from(FETCH_STARTS)), draw(st.sampled_from(FETCH_ENDS))
    if "path" in odd:
        start, end = draw(st.sampled_from([start, *ODD_STARTS])), draw(st.sampled_from([end, *ODD_ENDS]))
    training = draw(st.integers(0, 9)) == 0
    url = site + ("/api/v3/fine_tune_status/12202888" if training else start + end)
    url += draw(st.sampled_from(TAILS)) if "tail" in odd else ""
    return draw(struck(url)) if "struck" in odd else url


@st.composite
def struck(draw: st.DrawFn, url: str) -> str:
    """Draw the URL with one inserted character."""
    at = draw(st.integers(0, len(url)))
    put_in: str = draw(st.sampled_from([*"@:/\\?#%[]. \t\r\n\x00", "\u3002", "\uff0f", "\ufeff", "é"]))
    return url[:at] + put_in + url[at:]
