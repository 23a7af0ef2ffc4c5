"""One object of each kind that a path can name, in a team with a member of each role; made past the API, for speed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from argon2 import PasswordHasher

from agent.enrol.identity import certificate_request, new_key
from capsule.auth import keys as api_keys
from capsule.db.queries import keys, refresh_tokens, teams, users
from capsule.hosts.tokens import digest, new_refresh_token
from capsule.principals import PERMISSIONS
from tests.fixtures.people import QUICK

CSR = certificate_request(new_key())
HOUR = timedelta(hours=1)
MEMBERS = (("admin", "admin"), ("member", "member"), ("other_member", "member"))
PEOPLE = ("owner", *(who for who, _ in MEMBERS), "removed", "stranger", "homeless", "invited", "director", "nominal")
"""`director` is a platform admin with every permission, `nominal` one with none."""
PASSWORD = "correct horse battery staple"
HASH = PasswordHasher(memory_cost=QUICK["argon2_memory_kib"], time_cost=1, parallelism=1).hash(PASSWORD)


@dataclass(kw_only=True)
class Stage:
    """Ids and names, bare; `users` by what they are."""

    users: dict[str, UUID]
    emails: dict[str, str]
    team: UUID
    others: UUID
    keys: dict[str, str]
    key_ids: dict[str, UUID]
    sandbox: str
    template: str
    template_id: UUID
    host: UUID
    own_host: UUID
    host_token: str
    registration_token: str
    refresh_token: str

    def path(self, template):
        """`template` with its parameters filled in."""
        return template.format(
            sandbox_id=self.sandbox,
            team_id=f"team-{self.team}",
            user_id=f"usr-{self.users['other_member']}",
            key_id=f"key-{self.key_ids['owner']}",
            host_id=f"host-{self.host if template.endswith('/heartbeat') else self.own_host}",
            tag="zone-a",
            name=self.template,
            process="1",
            provider="github",
            asset="swagger-ui.css",
        )


async def build(people, agent, host_token):
    """A stage of its own: two teams; of one a sandbox, a template, keys."""
    tag, refresh = uuid4().hex[:12], new_refresh_token()

    async def make(tx):
        made = await _people(tx, tag)
        team = await teams.insert(tx, name="Subject", owner_id=made["owner"].id)
        others = await teams.insert(tx, name="Strangers", owner_id=made["stranger"].id, is_default=True)
        for who, role in MEMBERS:
            await tx.execute(
                "insert into memberships (team_id, user_id, role) values ($1, $2, $3)", team.id, made[who].id, role
            )
        texts, ids = await _keys(tx, team.id, others.id, made)
        template = await tx.fetchval(
            "insert into templates (team_id, name, type, vcpus, memory_mb, size_bytes)"
            " values ($1, $2, 'snapshot', 1, 512, 7) returning id",
            team.id,
            f"frozen-{tag}",
        )
        await refresh_tokens.insert(
            tx, host_id=agent.host, family=uuid4(), sha256=digest(refresh), expires_at=datetime.now(UTC) + HOUR
        )
        own = await _own_host(tx, team.id)
        return made, team.id, others.id, texts, ids, template, own

    made, team, others, texts, ids, template, own = await people.world.db.transaction(make)
    joining = await people.enrolment.create_host()
    return Stage(
        users={who: row.id for who, row in made.items()},
        emails={who: row.email for who, row in made.items()},
        team=team,
        others=others,
        keys=texts,
        key_ids=ids,
        sandbox=await people.sandbox(team, agent),
        template=f"frozen-{tag}",
        template_id=template,
        host=agent.host,
        own_host=own,
        host_token=host_token,
        registration_token=joining.registration_token,
        refresh_token=refresh,
    )


async def _own_host(tx, team):
    """A BYOC host of the team, tagged, that is online; nothing answers there."""
    host = await tx.fetchval(
        """insert into hosts (type, team_id, status, address, cert_fingerprint, arch, cpu_cores, memory_mb, disk_gb)
           values ('byoc', $1, 'online', $2, $3, 'x86_64', 1, 1, 1) returning id""",
        team,
        f"{uuid4()}:7001",
        uuid4().hex * 2,
    )
    await tx.execute("insert into host_tags (host_id, tag) values ($1, 'zone-a')", host)
    return host


async def _people(tx, tag):
    made = {
        who: await users.insert(tx, email=f"{who}.{tag}@example.com", name=who.title(), password_hash=HASH)
        for who in PEOPLE
    }
    admins = [made["director"].id, made["nominal"].id]
    await tx.execute("update users set is_admin = true where id = any($1)", admins)
    await tx.execute(
        "insert into admin_permissions (user_id, permission) select $1, unnest($2::text[])",
        made["director"].id,
        list(PERMISSIONS),
    )
    return made


async def _keys(tx, team, others, made):
    """Texts and ids by name."""
    texts, ids = {}, {}
    for name, of, by in (
        ("owner", team, "owner"),
        ("member", team, "member"),
        ("revoked", team, "owner"),
        ("stranger", others, "stranger"),
    ):
        new = api_keys.new_key()
        row = await keys.insert(tx, team_id=of, name=name, prefix=new.prefix, sha256=new.sha256, created_by=made[by].id)
        texts[name], ids[name] = new.text, row.id
    await keys.revoke(tx, team, ids["revoked"])
    return texts, ids
