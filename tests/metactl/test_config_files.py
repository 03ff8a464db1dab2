import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from metactl.config import (
    ConfigError,
    EnvironmentConfig,
    PPOConfig,
    TrainConfig,
    dump,
    find_config,
    parse,
    parse_assignment,
    read_config,
)
from metactl.policy import PolicyCard
from metactl.sweep.config import Range, SweepConfig
from models.rotary import rotation_names

RECIPES = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def write(tmp_path):
    def written(text):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def train_config(path=None, **changes):
    return read_config(TrainConfig, path, {k.replace("__", "."): v for k, v in changes.items()})


def refusal(path=None, **changes):
    with pytest.raises(ConfigError) as caught:
        train_config(path, **changes)
    message = str(caught.value)
    assert (path.name if path is not None else "the flags") in message
    return message


def test_without_a_file_and_changes_there_are_the_defaults():
    assert train_config() == TrainConfig()


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}"])
def test_an_empty_file_is_the_defaults(write, text):
    assert train_config(write(text)) == TrainConfig()


def test_a_file_changes_only_what_it_holds(write):
    config = train_config(write("ppo: {gamma: 0.9}\nseed: 4"))
    assert config == TrainConfig(ppo=PPOConfig(gamma=0.9), seed=4)


def test_changes_win_over_the_file(write):
    path = write("ppo: {gamma: 0.9, n_steps: 7}\nseed: 4")
    config = train_config(path, ppo__gamma=0.5, environment__options__horizon=80)
    assert (config.ppo.gamma, config.ppo.n_steps, config.seed) == (0.5, 7, 4)
    assert config.environment.options == {"horizon": 80}


def test_what_was_dumped_parses_to_the_same(write):
    config = train_config(ppo__hidden=[8], environment__options={"horizon": [4, 9], "data": None})
    assert parse(TrainConfig, yaml.safe_load(yaml.safe_dump(dump(config))), "dump") == config


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("ppo: {learning_rat: 1}", "ppo.learning_rat", "learning_rate"),
        ("sed: 1", "sed", "seed"),
        ("environment: {n_env: 4}", "environment.n_env", "n_envs"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_a_suggestion(write, text, key, suggestion):
    message = refusal(write(text))
    assert f"unknown key '{key}'" in message
    assert f"Did you mean '{suggestion}'?" in message


def test_an_unknown_key_that_resembles_none_lists_the_known():
    message = refusal(zzz=1)
    assert (
        "Known: environment, ppo, seed, checkpoint_every, policy_every, set_point_runs." in message
    )
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("environment.n_envs", 0),
        ("environment.n_workers", -2),
        ("ppo.gamma", 0.0),
        ("ppo.gamma", 1.1),
        ("ppo.gae_lambda", -0.1),
        ("ppo.bound_cost", -0.1),
        ("ppo.total_timesteps", 0),
        ("ppo.n_steps", -3),
        ("ppo.batch_size", 0),
        ("ppo.batch_size", 1),
        ("ppo.learning_rate", 0.0),
        ("ppo.learning_rate", float("nan")),
        ("ppo.learning_rate", float("inf")),
        ("ppo.learning_rate", 1e300),
        ("ppo.clip_range", float("nan")),
        ("ppo.clip_range", -0.1),
        ("ppo.log_std_init", float("inf")),
        ("ppo.ent_coef", -1e9),
        ("ppo.paired_runs", 0),
        ("checkpoint_every", 0),
        ("policy_every", -1),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_what_was_received(key, value):
    message = refusal(**{key.replace(".", "__"): value})
    assert key.split(".")[-1] in message
    assert re.search(rf"got {re.escape(str(value))}\b", message)


def test_a_hidden_layer_without_units_is_refused():
    assert "hidden must be units of at least 1, got [64, 0]" in refusal(ppo__hidden=[64, 0])


def test_fewer_workers_than_variants_are_refused_with_both_numbers():
    message = refusal(environment__n_workers=1, environment__variants=[{}, {}, {}])
    assert "n_workers must be at least 3, one for each variant, got 1" in message


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", "zero", "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("ppo.n_steps", 2.5, "a whole number"),
        ("ppo.n_steps", "many", "a whole number"),
        ("ppo.learning_rate", [1], "a number"),
        ("ppo.use_sde", 3, "true or false"),
        ("ppo.hidden", 64, "a list of whole numbers"),
        ("ppo", 3, "keys and values"),
        ("environment", None, "keys and values"),
        ("environment.id", [1], "text"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_in_words_of_yaml(key, value, words):
    message = refusal(**{key.replace(".", "__"): value})
    assert f"{key} must be {words}, got {value!r}" in message


@pytest.mark.parametrize("key", ["int", "list", "environment.str"])
def test_a_key_that_is_called_as_a_type_is_only_unknown(write, key):
    part, _, name = key.rpartition(".")
    text = f"{part}: {{{name}: 3}}" if part else f"{name}: 3"
    assert f"unknown key {key!r}" in refusal(write(text))


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001"])
def test_scientific_notation_is_a_number_where_one_is_expected(write, text):
    assert train_config(write(f"ppo: {{learning_rate: {text}}}")).ppo.learning_rate == 1e-4


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\t- x", b"\xff\xfe\x00", "a: !!python/name:os"]
)
def test_a_file_that_is_not_yaml_is_refused_in_one_line(write, text):
    message = refusal(write(text))
    assert "is not YAML" in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["- 1\n- 2", "hello", "3"])
def test_a_file_that_is_no_mapping_is_refused(write, text):
    assert "must hold keys and values" in refusal(write(text))


def test_a_key_that_is_no_text_is_refused(write):
    assert "Keys should be strings, got 1" in refusal(write("1: 2"))


def test_a_change_inside_a_section_that_is_empty_wins(write):
    assert train_config(write("ppo:"), ppo__gamma=0.5).ppo.gamma == 0.5


@pytest.mark.parametrize("text", ["ppo: 3", "ppo: [1]"])
def test_a_change_inside_a_section_that_is_no_mapping_is_refused(write, text):
    with pytest.raises(ConfigError, match="ppo"):
        train_config(write(text), ppo__gamma=0.5)


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read: No such file" in refusal(tmp_path / "nowhere.yaml")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_options_of_the_environment_are_left_to_the_environment():
    config = EnvironmentConfig(options={"anything": [1, {"deep": None}]})
    assert config.options == {"anything": [1, {"deep": None}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ppo.learning_rate=1e-4", ("ppo.learning_rate", 1e-4)),
        ("seed=3", ("seed", 3)),
        ("a.b=[1, 2]", ("a.b", [1, 2])),
        ("data=a=b", ("data", "a=b")),
        ("x=true", ("x", True)),
        ("x=", ("x", None)),
    ],
)
def test_an_assignment_is_a_key_and_a_yaml_value(text, expected):
    assert parse_assignment(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", "seed=["])
def test_what_is_no_assignment_is_refused(text):
    with pytest.raises(ConfigError, match=r"--set"):
        parse_assignment(text)


def test_a_recipe_is_found_by_path_and_by_name_and_else_the_recipes_are_listed(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("seed: 1")
    assert find_config(str(own)) == own
    recipes = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for name in [*recipes, "variants/givens", "configs/variants/givens.yaml"]:
        file = f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
        assert find_config(name).samefile(RECIPES / file)
    with pytest.raises(ConfigError, match="neither a file nor a recipe") as caught:
        find_config("no-such-recipe")
    assert all(name in str(caught.value) for name in recipes)


def test_every_recipe_says_its_command_and_holds_only_what_differs_from_the_defaults():
    varied = {"key": Range(grid=(0,))}
    kinds = {
        "train": TrainConfig(),
        "demo": TrainConfig(),
        "sweep": SweepConfig(space=varied),  # nothing to vary is no sweep
    }
    for path in sorted(RECIPES.rglob("*.yaml")):
        first, *_ = path.read_text().splitlines()
        words = shlex.split(first.removeprefix("# "))
        assert words[0] == "metactl", path.name
        assert words[1] in kinds, f"{path.name}: which configuration does {words[1]!r} read?"
        if "--config" in words:
            named = words[words.index("--config") + 1]
            assert find_config(named).samefile(path), path.name
        config = read_config(type(kinds[words[1]]), path, {})
        held = flat(yaml.safe_load(path.read_text()))
        defaults, full = flat(dump(kinds[words[1]])), flat(dump(config))
        for key, value in held.items():
            assert full[key] == value, (path.name, key)
            assert defaults.get(key) != value, f"{path.name}: {key} is the default"


def test_every_rotation_variant_has_a_recipe_that_says_why_in_a_line():
    recipes = {path.stem: path for path in (RECIPES / "variants").glob("*.yaml")}
    assert sorted(recipes) == rotation_names()
    for name, path in recipes.items():
        _, why, *_ = path.read_text().splitlines()
        assert why.startswith("# ") and why.endswith(".") and len(why) > 30
        options = read_config(TrainConfig, path, {}).environment.options
        assert options.get("rotation", "rope") == name


def flat(values, prefix=""):
    out = {}
    for key, value in values.items():
        inner = isinstance(value, dict)
        out |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return out


def test_a_configuration_that_holds_no_keys_is_refused():
    with pytest.raises(ConfigError, match=r"the card: a configuration must hold keys.*got 3"):
        parse(TrainConfig, 3, "the card")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "a: &a {b: *a}"])
def test_aliases_that_stand_for_too_much_are_refused_at_once(write, text):
    assert "is not YAML" in refusal(write(text))


def test_an_alias_is_what_it_stands_for(write):
    text = "environment: {variants: [&small {d_model: 16}, {d_model: 64}, *small], n_workers: 3}"
    variants = train_config(write(text)).environment.variants
    assert variants == ({"d_model": 16}, {"d_model": 64}, {"d_model": 16})


def test_a_config_that_is_no_plain_file_of_bounded_size_is_refused(tmp_path):
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_text("# " + "x" * (1 << 20))
    assert "it is no plain file" in refusal(pipe)
    assert "it is larger than 1 MiB" in refusal(large)


def test_a_number_is_one_in_a_list_too(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("space: {ppo.learning_rate: {grid: [1e-3, .5E2, 3e4, '1e-3', e-3]}}")
    grid = read_config(SweepConfig, file, {}).space["ppo.learning_rate"].grid
    assert grid == (1e-3, 50.0, 3e4, "1e-3", "e-3")
    assert parse_assignment("a=[1e-3, -2.5e+1]") == ("a", [1e-3, -25.0])


@pytest.mark.parametrize("text", ["1e5-corpus.txt", "3e8f2a1", "2e3-texts"])
def test_a_text_that_begins_like_a_number_is_a_text(write, text):
    config = train_config(write(f"environment: {{options: {{data: {text}}}}}"))
    assert config.environment.options == {"data": text}
    assert parse_assignment(f"a={text}") == ("a", text)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ("{max_gradient_norm: .inf}", "options.max_gradient_norm must be finite, got inf"),
        ("{horizon: [40, .nan]}", "options.horizon.1 must be finite, got nan"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_before_the_work(write, options, where):
    assert where in refusal(write(f"environment: {{options: {options}}}"))


def test_what_an_alias_stands_for_changes_in_one_place_alone(write):
    text = "environment: {options: &o {context: 32}, variants: [*o], n_workers: 1}"
    config = train_config(write(text), environment__options__context=64)
    assert config.environment.options == {"context": 64}
    assert config.environment.variants == ({"context": 32},)


def test_changes_do_not_reach_into_each_other():
    changes = {"ppo": {"learning_rate": 0.1}, "ppo.gamma": 0.9}
    assert read_config(TrainConfig, None, changes).ppo.gamma == 0.9
    assert changes["ppo"] == {"learning_rate": 0.1}


def test_a_key_that_is_there_twice_is_refused(write):
    assert "key 'seed' is there 2 times" in refusal(write("seed: 1\nseed: 2"))
    with_both = "environment: {options: {1: a, '1': b}}"  # a number and a text
    assert "there 2 times" not in refusal(write(with_both + "\nsed: 1"))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("seed: true", "seed must be a number, got True"),
        ("ppo: {learning_rate: true}", "ppo.learning_rate must be a number, got True"),
        ("environment: {n_envs: false}", "environment.n_envs must be a number, got False"),
        ("ppo: {hidden: [32, true]}", "ppo.hidden.1 must be a number, got True"),
        ("ppo: {hidden: true}", "ppo.hidden must be a list of whole numbers, got True"),
    ],
)
def test_true_is_no_number(write, text, where):
    assert where in refusal(write(text))
    assert train_config(write("ppo: {use_sde: true}")).ppo.use_sde


def test_true_is_no_number_in_an_optional_part_either():
    with pytest.raises(ConfigError, match=r"stop\.patience must be a number, got True"):
        parse(SweepConfig, {"space": {"seed": {"grid": [1]}}, "stop": {"patience": True}}, "here")


def test_a_key_that_must_be_there_is_named():
    with pytest.raises(ConfigError, match=r"^here: metactl_version is missing$"):
        parse(PolicyCard, {"format_version": 1}, "here")


def test_a_seed_that_shares_its_tasks_with_another_is_refused():
    assert "seed must be below 32768 (others share tasks), got 32773" in refusal(seed=32773)


def test_recipes_are_found_by_a_path_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./configs/default.yaml", "configs//default", "default.yml", "./default"):
        assert find_config(name).name == "default.yaml"


@pytest.mark.parametrize("name", ["train.v2", ".", "train.yaml.bak"])
def test_a_recipe_of_nearly_the_name_is_another(name):
    with pytest.raises(ConfigError, match="is neither a file nor a recipe"):
        find_config(name)
    assert find_config("configs/train.yaml").resolve() == find_config("train")


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (("ppo", "ppo.gamma"), "ppo holds ppo.gamma"),
        (("ppo.gamma", "ppo"), "ppo holds ppo.gamma"),
        (("environment", "seed"), "environment holds environment.shards"),
    ],
)
def test_keys_of_a_space_that_hold_each_other_are_refused(space, words):
    values = {"space": {key: {"grid": [1]} for key in space}}
    with pytest.raises(ConfigError, match=words):
        parse(SweepConfig, values, "here")
