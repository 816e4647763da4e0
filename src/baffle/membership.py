"""What a config says of protection, made real: rosters, aggregators, seals. Both sides make theirs of it.

Without torch: a device that cannot train insists on the same settings as the server that proposes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baffle.aggregation import IntegerSum, Seal
from baffle.config import TrainConfig
from baffle.errors import ConfigError
from baffle.fixedpoint import FixedPoint
from baffle.privacy import Accountant, Privacy, Unit, calibrate
from baffle.secagg.parameters import part
from baffle.stream import derive_seed, seed_from
from baffle.terms import Terms

if TYPE_CHECKING:  # at run time, only where secure sums are asked for: they need cryptography
    from baffle.secagg.primitives import Identity
    from baffle.secagg.session import Roster
    from baffle.secure import Ledger, Protection, SecureSum


def identities(config: TrainConfig, names: Sequence[str] | None) -> tuple[Roster | None, dict[str, Identity]]:
    """The roster of secure sums, and keys where ``names`` are a simulation's clients: it makes them for all.

    None: clients are on devices, which have keys of their own, and pin the roster of a file. Raises
    ConfigError where that is not named, DataError where it is no roster.
    """
    if not config.secure:
        return None, {}
    from baffle.identities import read_roster
    from baffle.secagg.primitives import Identity
    from baffle.secagg.session import Roster

    if names is None:
        if config.roster is None:
            raise ConfigError("secure sums over devices need the clients' public keys: --roster FILE")
        return read_roster(Path(config.roster)), {}
    made = {name: Identity.generate() for name in names}
    return Roster({name: identity.public for name, identity in made.items()}), made


def protection(
    config: TrainConfig, sizes: list[int], rounds: int, directions: int, roster: Roster | None
) -> tuple[IntegerSum | SecureSum | None, Accountant | None]:
    """The aggregator that the config asks for, and who counts ε. ``sizes``: how many samples clients have."""
    if not config.secure and config.privacy is None:
        return None, None
    cohort = min(config.cohort or len(sizes), len(sizes))
    standing = cohort - part(config.max_dropout, cohort)  # answer at least

    def terms_for(shares: int) -> tuple[Terms, Accountant | None]:
        privacy = _privacy(config, sum(sizes), len(sizes), rounds, shares)
        terms = _terms(config, cohort, max(sizes), privacy)
        return terms, None if privacy is None else Accountant(privacy, terms.fixed_point, directions)

    if roster is None:
        terms, accountant = terms_for(standing)
        return IntegerSum(terms), accountant
    from baffle.secure import SecureSum

    protects = sums(config)
    settings, policy = protects.settings(cohort), protects.policy
    terms, accountant = terms_for(
        min(policy.check(settings, cohort, present) for present in (cohort, standing))
    )
    return SecureSum(roster, terms, protects, job=job_name(config)), accountant


def sums(config: TrainConfig) -> Protection:
    """How the config's secure sums are made, and what clients insist on."""
    from baffle.secure import Protection

    # Where each round has another cohort, each has keys of its own.
    session = 1 if config.cohort else config.session_rounds
    return Protection(config.max_colluding, config.max_dropout, rounds=session)


def job_name(config: TrainConfig) -> bytes:
    """What the config's job is called in ledgers: 32 bytes of its seed."""
    return derive_seed(seed_from(config.seed), "job")


def seal(
    config: TrainConfig,
    name: str,
    identity: Identity,
    roster: Roster,
    accountant: Accountant | None,
    ledger: Ledger | None = None,
    job: bytes | None = None,
    least: int | None = None,
) -> Seal:
    """A client's half of secure sums: it insists on what the config promises, its noise included.

    ``least``: on that many honest clients at least in whatever can be opened, too.
    """
    from baffle.secure import SecureSeal

    noise = config.noise_multiplier or 0.0
    if accountant is not None:
        noise = accountant.privacy.noise_multiplier
    elif config.target_epsilon is not None:
        raise ConfigError("on a device, say the noise multiplier that target-epsilon came to, not the ε")
    policy = sums(config).policy
    policy = dataclasses.replace(policy, least=max(policy.least, least or 0))
    return SecureSeal(name, identity, roster, policy, least_noise=noise, ledger=ledger, job=job)


def device_seal(
    config: TrainConfig,
    name: str,
    identity: Identity | None,
    ledger: Ledger | None = None,
    least: int | None = None,
) -> Seal | None:
    """``seal`` of a device, by the config's roster and for the job of its seed; None for sums in the clear.

    Raises ConfigError where the key is missing or is not the roster's, SecurityError for a name that is not
    on it.
    """
    roster, _ = identities(config, None)
    if roster is None:
        return None
    if identity is None:
        raise ConfigError(f"client {name}: secure sums need its key: --identity FILE")
    if roster.keys[roster.place(name)] != identity.public:
        raise ConfigError(f"client {name}: its key is not the one that the roster {config.roster} has")
    return seal(config, name, identity, roster, None, ledger, job=job_name(config), least=least)


def _privacy(config: TrainConfig, samples: int, clients: int, rounds: int, shares: int) -> Privacy | None:
    if config.privacy is None or config.clip_norm is None:
        return None
    rate = 1.0
    if config.privacy == "example":
        rate = config.batch_size * clients / samples
        if not 0 < rate <= 1:
            raise ConfigError(
                f"batch-size = {config.batch_size}: with privacy it is the number of examples that a client "
                f"is expected to sample, above 0 and at most the {samples // clients} that it has"
            )
    noise = config.noise_multiplier
    if noise is None:
        noise = calibrate(float(config.target_epsilon or 0), config.delta, rounds, rate)
    unit: Unit = "example" if config.privacy == "example" else "client"
    return Privacy(unit, config.clip_norm, noise, rate, shares)


def _terms(config: TrainConfig, cohort: int, largest: int, privacy: Privacy | None) -> Terms:
    """With as many fraction bits as leave room for every sum, and for the noise."""
    limit = config.ring_limit if privacy is None else privacy.clip
    weight = 1 if config.privacy == "client" else largest
    point = FixedPoint.fitting(cohort, weight, limit, config.ring_bits)
    while True:
        try:
            return Terms(point, cohort, largest, privacy=privacy)
        except ConfigError:
            if privacy is None or point.fraction_bits <= 8:
                raise
            point = dataclasses.replace(point, fraction_bits=point.fraction_bits - 1)
