"""docker-compose.yml, the Dockerfile and .env.example, held against the code; no Docker is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from services import absent

from netassay.settings import Settings
from netassay.store.database import Database
from producer import lab
from producer.cli import app

ROOT = Path(__file__).parent.parent
OURS = ("dispatcher", "monitor", "worker", "flower", "producer")
#: A variable with its default (`:-`) or the complaint where it is missing (`:?`).
VARIABLE = re.compile(r"\$\{(\w+)(?:(:[-?])([^}]*))?\}")
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|KEY")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docker-compose.yml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(text)["services"]


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "docker" / "Dockerfile").read_text()


def variables_of(service: dict[str, Any]) -> dict[str, str]:
    return {name: str(value or "") for name, value in (service.get("environment") or {}).items()}


def seconds(duration: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


def parse(words: list[str]) -> None:
    """Hand a command line of `netassay` to the parser of its verb, without running it. Raises typer's errors."""
    group: Any = typer.main.get_command(app)
    assert words[0] in group.commands, f"there is no verb {words[0]}"
    group.commands[words[0]].make_context(words[0], list(words[1:]))


def test_there_is_a_service_for_each_part_of_a_lab(services: dict[str, Any]) -> None:
    assert set(services) == {"redis", "postgres", *OURS}
    assert services["producer"]["profiles"] == ["tools"], "one verb at a time, not started by `up`"
    assert all("profiles" not in service for name, service in services.items() if name != "producer")
    assert "container_name" not in services["worker"], "a service with a name of its own cannot be scaled"
    assert "hostname" not in services["worker"], "workers are told apart by their host"


@pytest.mark.parametrize("name", ["dispatcher", "monitor", "worker"])
def test_commands_are_verbs_and_their_flags_exist(services: dict[str, Any], name: str) -> None:
    assert services[name]["entrypoint"] == ["tini", "--", "netassay"]
    parse(services[name]["command"])
    with pytest.raises(typer.TyperException, match="--nonsense"):
        parse([*services[name]["command"], "--nonsense"])


def test_flower_is_started_as_the_lab_of_one_host_starts_it(services: dict[str, Any]) -> None:
    service = services["flower"]
    python = [word for word in service["entrypoint"] if word not in ("tini", "--")]
    ours = lab.flower_command(5555, "0.0.0.0")
    assert [*python, *service["command"]] == ["python", *ours[1:]]


def test_the_images_start_the_same(services: dict[str, Any], dockerfile: str) -> None:
    assert dockerfile.count('ENTRYPOINT ["tini", "--", "netassay"]') == 2
    worker = dockerfile[dockerfile.index("AS worker\n") :]
    assert f'CMD ["{services["worker"]["command"][0]}"]' in worker


def test_settings_in_the_file_are_settings_of_the_code(text: str, services: dict[str, Any], dockerfile: str) -> None:
    fields = {f"NETASSAY_{name.upper()}" for name in Settings.model_fields}
    for where in (text, dockerfile, (ROOT / ".env.example").read_text()):
        assert set(re.findall(r"NETASSAY_[A-Z_]+", where)) <= fields
    for name in OURS:
        assert {"NETASSAY_BROKER", "NETASSAY_STORE", "NETASSAY_ARTIFACTS"} <= set(variables_of(services[name]))


def test_addresses_name_services_of_the_file(services: dict[str, Any]) -> None:
    for name in OURS:
        environment = variables_of(services[name])
        assert re.fullmatch(
            r"redis://netassay:\$\{REDIS_PASSWORD:\?[^}]+\}@redis:6379/0", environment["NETASSAY_BROKER"]
        )
        store = environment["NETASSAY_STORE"]
        assert re.fullmatch(r"postgresql://netassay:\$\{POSTGRES_PASSWORD:\?[^}]+\}@postgres:5432/netassay", store)
        assert set(services[name]["depends_on"]) == {"redis", "postgres"}
    postgres = variables_of(services["postgres"])
    assert (postgres["POSTGRES_USER"], postgres["POSTGRES_DB"]) == ("netassay", "netassay")
    assert "user netassay on" in (ROOT / "docker" / "redis" / "users.acl").read_text()
    assert re.search(r"^port 6379$", (ROOT / "docker" / "redis" / "redis.conf").read_text(), re.MULTILINE)


def test_no_secret_has_a_default_and_the_required_ones_complain(text: str) -> None:
    found = [match.groups() for match in VARIABLE.finditer(text)]
    required = {name for name, how, _ in found if how == ":?"}
    assert required == {"REDIS_PASSWORD", "POSTGRES_PASSWORD", "FLOWER_PASSWORD"}
    for name, how, default in found:
        if name in required:
            assert how == ":?", f"{name} is required everywhere"
            assert f"set {name}" in default
        else:
            assert how == ":-", f"{name} has neither a default nor a complaint"
            assert not SECRET.search(name) or default == "", f"{name} has a default"


def test_the_example_of_the_environment_names_every_variable_and_no_secret(text: str) -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = dict(re.fullmatch(r"#?(\w+)=(.*)", line).groups() for line in lines if re.match(r"#?\w+=", line))  # type: ignore[union-attr,misc]
    passed_on = {
        name for name in yaml.safe_load(text)["x-settings"] if yaml.safe_load(text)["x-settings"][name] is None
    }
    named = {match[1] for match in VARIABLE.finditer(text)} | passed_on
    assert named - set(given) == {"AWS_SESSION_TOKEN"}, "that one lives for hours, it is no setting"
    assert set(given) <= named
    assert all(value == "" for name, value in given.items() if SECRET.search(name))
    set_there = {line.partition("=")[0] for line in lines if re.match(r"\w+=", line)}
    assert set_there == {"REDIS_PASSWORD", "POSTGRES_PASSWORD", "FLOWER_PASSWORD"}


def test_nothing_is_published_but_numbers_and_flower_on_loopback_behind_a_password(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert list(published) == ["monitor", "flower"]
    for name, number in (("monitor", 5556), ("flower", 5555)):
        (port,) = published[name]
        assert port.startswith("127.0.0.1:")
        assert port.endswith(f":{number}")
    assert "FLOWER_PASSWORD:?" in variables_of(services["flower"])["FLOWER_BASIC_AUTH"]
    assert all("network_mode" not in service and service["networks"] == ["lab"] for service in services.values())


def test_everything_that_runs_for_long_has_a_health_check_that_exists(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name == "producer":
            continue
        test = service["healthcheck"]["test"]
        assert test[0] in ("CMD", "CMD-SHELL"), name
        if "-m" in test:
            assert importlib.util.find_spec(test[test.index("-m") + 1]) is not None
            assert test[:3] == ["CMD", "python", "-P"]
    assert services["worker"]["healthcheck"]["test"][-1] == "worker.health"
    assert "redis-cli --user netassay ping" in services["redis"]["healthcheck"]["test"][1]


@pytest.mark.parametrize("module, store, says", [
    ("worker.health", "sqlite:////proc/none/store.sqlite", "the store does not answer.*NETASSAY_STORE"),
    ("producer.health", "sqlite:////proc/none/store.sqlite", "the store does not answer.*NETASSAY_STORE"),
    ("producer.health", "", "the broker redis://127.0.0.1:1/0 does not answer.*NETASSAY_BROKER"),
])  # fmt: skip
def test_a_check_fails_in_words_where_nothing_answers(module: str, store: str, says: str, tmp_path: Path) -> None:
    config = Settings(home=tmp_path)
    Database(config.store_url).prepare()
    environment = {
        **os.environ,
        "NETASSAY_HOME": str(tmp_path),
        "NETASSAY_STORE": store,
        "NETASSAY_BROKER": "redis://127.0.0.1:1/0",
    }
    command = [sys.executable, "-P", "-m", module]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert ended.returncode == 1
    assert re.search(says, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_image_of_the_worker_has_the_same_health_check(services: dict[str, Any], dockerfile: str) -> None:
    words = ", ".join(f'"{word}"' for word in services["worker"]["healthcheck"]["test"][1:])
    assert f"CMD [{words}]" in dockerfile


def test_a_check_may_take_longer_than_what_it_waits_for(services: dict[str, Any]) -> None:
    from worker import health

    assert seconds(services["worker"]["healthcheck"]["timeout"]) > health.WAIT_SECONDS + 5


def test_a_worker_is_given_the_time_to_end_in_good_order(services: dict[str, Any]) -> None:
    assert seconds(services["worker"]["stop_grace_period"]) >= Settings().grace + 10


def test_redis_keeps_what_it_has_and_refuses_the_rest() -> None:
    lines = (ROOT / "docker" / "redis" / "redis.conf").read_text().splitlines()
    values = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    assert (values["appendonly"], values["appendfsync"]) == ("yes", "everysec")
    assert values["maxmemory-policy"] == "noeviction"
    assert "requirepass" not in values


def test_volumes_are_declared_and_folders_of_the_repository_exist(text: str, services: dict[str, Any]) -> None:
    declared = set(yaml.safe_load(text)["volumes"])
    used = set()
    for service in services.values():
        for volume in service.get("volumes", []):
            # The default stands for a variable: METHODS_FOLDER may be a folder of the host, and is a volume if unset.
            source = VARIABLE.sub(lambda match: match[3] or "", volume).split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_dir(), volume
            else:
                used.add(source)
    assert used == declared
    for name in OURS:
        targets = [VARIABLE.sub("", volume).split(":")[1] for volume in services[name]["volumes"]]
        assert {"/artifacts", "/methods"} <= set(targets)


def test_build_targets_exist_and_what_they_copy_does_too(services: dict[str, Any], dockerfile: str) -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE)
    for name in OURS:
        build = services[name]["build"]
        assert (ROOT / build["context"] / build["dockerfile"]).is_file()
        assert build["target"] in stages
        arguments = set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
        assert set(build.get("args", {})) <= arguments
        assert services[name]["image"] == f"netassay-{build['target']}"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, re.MULTILINE)
    for source in {word for line in sources for word in line.split()}:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, f"{source} is left out by .dockerignore"
    for source in re.findall(r"^COPY --from=(\S+)", dockerfile, re.MULTILINE):
        assert source in stages
    extras = re.findall(r'"\.\[([^\]]+)\]"', dockerfile)
    assert extras == ["s3", "compute,s3"]


def test_nobody_is_root(services: dict[str, Any], dockerfile: str) -> None:
    for target in ("producer", "worker"):
        stage = dockerfile[dockerfile.index(f"AS {target}\n") :].split("FROM ")[0]
        assert "\nUSER netassay\n" in stage
    assert services["redis"]["user"] == "redis"


def test_scripts_parse() -> None:
    subprocess.run(["sh", "-n", str(ROOT / "docker" / "redis" / "start.sh")], check=True)


def composers() -> list[list[str]]:
    found = []
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        found.append(["docker", "compose"])
    if shutil.which("docker-compose"):
        found.append(["docker-compose"])
    return found


@pytest.mark.parametrize("command", composers() or [[]], ids=" ".join)
def test_compose_itself_takes_the_file(command: list[str], tmp_path: Path) -> None:
    if not command:
        absent("no docker compose on PATH (apt install docker-compose)")
    (tmp_path / "env").write_text("REDIS_PASSWORD=a\nPOSTGRES_PASSWORD=b\nFLOWER_PASSWORD=c\nWORKER_MEMORY=2g\n")
    (tmp_path / "empty").write_text("")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_PASSWORD")}

    def config(file: str) -> subprocess.CompletedProcess[str]:
        arguments = [*command, "--env-file", str(tmp_path / file), "--profile", "tools", "config"]
        return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)

    valid = config("env")
    assert valid.returncode == 0, valid.stderr
    assert set(yaml.safe_load(valid.stdout)["services"]) == {"redis", "postgres", *OURS}
    invalid = config("empty")
    assert invalid.returncode != 0
    assert "PASSWORD" in invalid.stderr
