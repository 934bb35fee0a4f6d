"""Hardware profiles: all constants there, with their sources, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from offramp.energy import profiles
from offramp.energy.profiles import DTYPES, SHIPPED, Profile, load_profile, shipped_profiles
from offramp.errors import ConfigError

OWN = """
name = "own"
version = 3
description = "made up"
idle_mw = { value = 5, status = "measured", source = "a wall meter" }

[[tiers]]
name = "near"
kind = "sram"
size_bytes = { value = 1000, status = "paper", source = "its table 1" }
read_pj_per_byte = { value = 2, status = "paper", source = "its table 1" }
write_pj_per_byte = { value = 3, status = "paper", source = "its table 1" }

[[tiers]]
name = "far"
kind = "flash"
size_bytes = "unlimited"
read_pj_per_byte = { value = 50.5, status = "paper", source = "its table 1" }
write_pj_per_byte = "never"

[mac_pj]
fp32 = { value = 5, status = "assumed", source = "none" }
fp16 = { value = 2, status = "assumed", source = "none" }
bf16 = { value = 2, status = "assumed", source = "none" }
int8 = { value = 0.5, status = "assumed", source = "none" }
int4 = { value = 0.2, status = "assumed", source = "none" }
"""


def load(folder: Path, text: str) -> Profile:
    path = folder / "own.toml"
    path.write_text(text)
    return load_profile(str(path))


def test_shipped_profiles_hold_the_constants_of_the_reference() -> None:
    far = {p.name: p.tiers[-1] for p in shipped_profiles()}
    assert tuple(far) == SHIPPED
    assert {t.read_pj_per_byte.value for n, t in far.items() if n != "mcu"} == {160, 64, 300}
    assert (far["edge45"].read_pj_per_byte.value, far["mobile-low"].read_pj_per_byte.value) == (
        160,
        64,
    )
    assert far["mcu"].kind == "flash"
    assert load_profile("mcu").tiers[0].size == 512 * 1024
    edge = load_profile("edge45")
    assert [edge.mac_pj[d].value for d in DTYPES] == [4.6, 1.5, 1.5, 0.30, 0.15]
    assert (edge.tier("shared").size, edge.tier("shared").read_pj_per_byte.value) == (2**21, 12.5)
    assert edge.idle_mw is None


def test_every_file_in_the_folder_ships_under_its_own_name() -> None:
    folder = Path(profiles.__file__).parent / "profiles"
    assert {path.stem for path in folder.iterdir()} == set(SHIPPED)
    for name in SHIPPED:
        assert load_profile(name).name == name


def test_what_has_no_source_says_so() -> None:
    """`paper` is for what we read there ourselves: none of these."""
    for profile in shipped_profiles():
        constants = [*profile.mac_pj.values()]
        for tier in profile.tiers:
            constants += [c for c in (tier.size_bytes, tier.write_pj_per_byte) if c]
            constants.append(tier.read_pj_per_byte)
        assert all(c.status in ("second-hand", "estimate", "assumed") for c in constants)
        assert profile.mac_pj["int4"].status == "assumed"


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    profile = load(tmp_path, OWN)
    assert (profile.name, profile.version) == ("own", 3)
    near, far = profile.tiers
    assert near.write_pj_per_byte is not None and near.write_pj_per_byte.value == 3
    assert (far.size, far.write_pj_per_byte) == (float("inf"), None)
    assert profile.idle_mw is not None and profile.idle_mw.source == "a wall meter"


NEAR, FAR = OWN.index("[[tiers]]"), OWN.index('[[tiers]]\nname = "far"')
MACS = OWN.index("[mac_pj]")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (re.sub("int4 = .*", "", OWN), "mac_pj lacks int4; add it"),
        (
            OWN + 'fp8 = { value = 1, status = "paper", source = "x" }',
            "mac_pj has no dtype fp8; all",
        ),
        (re.sub("version = 3", "", OWN), "Profile lacks version; add it"),
        ("colour = 1\n" + OWN, "Profile has no setting colour; allowed: name, version"),
        (
            re.sub("read_pj_per_byte = { value = 50.*", "", OWN),
            "tiers.far: Tier lacks read_pj_per_",
        ),
        (
            OWN.replace('kind = "flash"', 'kind = "disk"'),
            "tiers.far: kind is 'disk'; allowed: sram, ",
        ),
        (
            OWN.replace("50.5", "-1"),
            "tiers.far: read_pj_per_byte: value is -1; it must be a number",
        ),
        (OWN.replace("50.5", "nan"), "tiers.far: read_pj_per_byte: value is nan; it must be"),
        (
            OWN.replace("value = 1000", "value = 0.5"),
            "tiers.near: size_bytes is 0.5; it must be a w",
        ),
        (OWN.replace("value = 1000, ", ""), "tiers.near: size_bytes: Constant lacks value"),
        (OWN.replace('"a wall meter"', '" "'), "idle_mw: source is ' '; it must be text"),
        (
            OWN.replace('"measured"', '"sure"'),
            "idle_mw: status is 'sure'; allowed: paper, second-h",
        ),
        (OWN.replace('"unlimited"', '"lots"'), "size_bytes is 'lots'; allowed: { value, status, s"),
        (OWN.replace('"never"', "7"), 'write_pj_per_byte is 7; allowed: .* or "never"'),
        (OWN.replace('"far"', '"near"'), "two tiers have the same name"),
        (OWN.replace("50.5", "1.5"), "out of order: far costs less per byte than near"),
        (
            OWN[:NEAR] + OWN[FAR:MACS] + OWN[NEAR:FAR] + OWN[MACS:],
            "order: near is not larger than far",
        ),
        (OWN[:NEAR] + OWN[MACS:], "Profile lacks tiers"),
        ("tiers = []\n" + OWN[:NEAR] + OWN[MACS:], "tiers are missing; list at least one"),
        (
            "tiers = 1\n" + OWN[:NEAR] + OWN[MACS:],
            r"tiers is 1; write each as a \[\[tiers\]\] table",
        ),
        ("mac_pj = 1\n" + OWN[:MACS], "mac_pj is 1; it must be a table"),
        (OWN.replace('"own"', '"edge45"'), "name is 'edge45', a shipped profile's; give yours"),
        (OWN.replace("version = 3", "version = '3'"), "version is '3'; it must be a whole number"),
        ("name = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'own.toml'}: ")
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no hardware profile 'edge46'; allowed: edge45, mobile-low"
    ):
        load_profile("edge46")
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read: No such file"):
        load_profile(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="edge45 has no tier 'l2'; allowed: local, shared, dram"):
        load_profile("edge45").tier("l2")
