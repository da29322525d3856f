"""The options of Flower: the operator's FLOWER_* variables, our defaults for the others, and a login in any case."""

import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flower.options import options as known_options
from flower.utils import strtobool

from worker.configuration.environment import clean, read_environment
from worker.errors import SettingsError
from worker.settings import Settings, dotenv_file

PREFIX = "FLOWER_"
DEFAULT_PORT = 5555
DEFAULTS = {
    "FLOWER_CONF": os.devnull,  # a flowerconfig.py in the working directory belongs to the web app's own Flower
    "FLOWER_PERSISTENT": "true",
    "FLOWER_STATE_SAVE_INTERVAL": "10000",
    "FLOWER_INSPECT_TIMEOUT": "3000",
    "FLOWER_NATURAL_TIME": "false",
    "FLOWER_TASKS_COLUMNS": "name,uuid,state,args,result,received,runtime",  # as wide as a common screen
}
OAUTH = ("auth", "auth_provider", "oauth2_key", "oauth2_secret", "oauth2_redirect_uri")
PROVIDERS = "flower.views.auth."  # the module of Flower's own providers; others may need less than these options
OKTA, OKTA_ADDRESS = f"{PROVIDERS}OktaLoginHandler", "oauth2_okta_base_url"
# Flower reads these variables from the environment. They are no options.
DOMAINS = frozenset({"github_oauth_domain", "gitlab_oauth_domain"})
NO_OPTIONS = DOMAINS | {OKTA_ADDRESS, "gitlab_auth_allowed_groups", "gitlab_min_access_level", "unauthenticated_api"}
READERS: Mapping[type, tuple[Callable[[str], object], str]] = {
    bool: (strtobool, "true or false"),
    int: (int, "a number"),
    float: (float, "a number"),
}

Options = Mapping[str, object]


def configure_flower(settings: Settings, arguments: Sequence[str]) -> None:
    """Put Flower's options into the environment, where it reads them. By default it listens on this machine only.

    Raises SettingsError if an option is wrong, or if a login by OAuth is not complete.
    """
    os.umask(0o077)  # its files are readable by this user only
    variables = read_environment(os.environ, dotenv_file())
    options = flower_options(variables)
    _check_domains(options)
    _name_ignored(variables)
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        del os.environ[name]
    os.environ.update({PREFIX + name.upper(): value for name, value in options.items()})
    if strtobool(options.get("persistent", "true")):
        os.environ.setdefault("FLOWER_DB", str(settings.state / "flower"))
    if settings.flower_basic_auth is not None:
        os.environ["FLOWER_BASIC_AUTH"] = settings.flower_basic_auth.get_secret_value()
    port = settings.flower_port if settings.flower_port is not None else settings.port
    os.environ["FLOWER_ADDRESS"] = settings.flower_address
    os.environ["FLOWER_PORT"] = str(DEFAULT_PORT if port is None else port)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    _require_login(_effective_options(options, arguments))


def check_flower(environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Raise SettingsError if Flower would refuse its options. If it has a file, only Flower itself can tell."""
    options = flower_options(read_environment(environment, None)) | command_line_options(arguments)
    if "conf" not in options:
        check_oauth(options)


def flower_options(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the options in the variables of an environment, cleaned. Raises SettingsError for a wrong value.

    Unknown variables are left out: they would end some releases of Flower.
    """
    values: dict[str, str] = {}
    for variable in [variable for variable in environment if variable.startswith(PREFIX)]:
        name = variable.removeprefix(PREFIX).lower()
        if name not in known_options and name not in NO_OPTIONS:
            continue
        try:
            value = values[name] = clean(environment[variable])
        except ValueError as error:
            raise SettingsError(f"{variable} {error}") from None
        option_type = type(known_options[name]) if name in known_options else str
        read, description = READERS.get(option_type, (str, "text"))
        try:
            read(value)
        except ValueError:
            raise SettingsError(f"{variable} must be {description}") from None
    return values


def command_line_options(arguments: Sequence[str]) -> dict[str, str]:
    """Return the options in a command line.

    >>> command_line_options(["celery", "-A", "worker.app", "flower", "--basic-auth=ops:secret"])
    {'basic_auth': 'ops:secret'}
    """
    parts = [argument.lstrip("-").partition("=") for argument in arguments if argument.startswith("-")]
    return {name.replace("-", "_"): value for name, separator, value in parts if separator}


def check_oauth(options: Options) -> None:
    """Raise SettingsError if a login by OAuth is only half configured, with the names of what is missing."""
    if not any(options.get(name) for name in OAUTH):
        return
    provider = str(options.get("auth_provider") or PROVIDERS)
    needed = list(OAUTH if provider.startswith(PROVIDERS) else OAUTH[:2])
    if provider == OKTA:
        needed.append(OKTA_ADDRESS)
    missing = [PREFIX + name.upper() for name in needed if not options.get(name)]
    if missing:
        all_names = ", ".join(PREFIX + name.upper() for name in needed)
        raise SettingsError(f"{' and '.join(missing)} must be set: a login by OAuth in Flower needs {all_names}")
    if provider.startswith(PROVIDERS):
        from flower.views import auth  # here, since it is slow to import, and few use it

        if not hasattr(auth, provider.removeprefix(PROVIDERS)):
            names = [name for name in vars(auth) if name.endswith("LoginHandler") and name != "LoginHandler"]
            raise SettingsError(f"FLOWER_AUTH_PROVIDER must be one of {', '.join(PROVIDERS + name for name in names)}")


def _name_ignored(variables: Iterable[str]) -> None:
    """Name the variables that nothing reads: they may be misspelt."""
    ours = {name.upper() for name in Settings.model_fields}
    flowers = {PREFIX + name.upper() for name in NO_OPTIONS.union(known_options)}
    ignored = sorted(name for name in variables if name.startswith(PREFIX) and name not in ours | flowers)
    if ignored:
        print(f"fetch-worker: no option of Flower, ignored: {', '.join(ignored)}", file=sys.stderr, flush=True)


def _check_domains(options: Options) -> None:
    """Refuse the domain of a provider that Flower has not read: it does so before this process reads `.env`."""
    for name in sorted(DOMAINS & options.keys()):
        variable = PREFIX + name.upper()
        if os.environ.get(variable) != options[name]:
            raise SettingsError(f"{variable} must be in the environment itself, without quotation marks: not in .env")


def _effective_options(options: Options, arguments: Sequence[str]) -> Options:
    """Return the options as Flower will have them: the command line wins over its file, and the file over variables."""
    command_line = command_line_options(arguments)
    conf = str(command_line.get("conf") or options.get("conf") or "")
    return {**options, **(_file_options(Path(conf).absolute()) if conf else {}), **command_line}


def _file_options(path: Path) -> Options:
    before: dict[str, Any] = known_options.as_dict()
    try:
        known_options.parse_config_file(str(path), final=False)  # Flower reads it again
    except Exception as error:  # the file is Python code
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise SettingsError(f"FLOWER_CONF names {path}, which cannot be read ({reason})") from None
    return {name: value for name, value in known_options.as_dict().items() if value != before[name]}


def _require_login(options: Options) -> None:
    check_oauth(options)
    if not options.get("auth") and not options.get("basic_auth"):
        password = secrets.token_urlsafe(12)
        os.environ["FLOWER_BASIC_AUTH"] = f"admin:{password}"
        print(f"Flower: log in as admin with {password} (set FLOWER_BASIC_AUTH to choose)", file=sys.stderr, flush=True)
