-- Hosts, their tokens, the certificate authority.

create table if not exists hosts (
  id                 uuid primary key default gen_random_uuid(),
  type               text not null constraint hosts_type check (type in ('regular', 'byoc')),
  team_id            uuid constraint hosts_team references teams,   -- of a byoc host only
  provider           text,
  availability_zone  text,
  status             text not null default 'pending'
                     constraint hosts_status check (status in ('pending', 'online', 'unreachable', 'draining')),
  cordoned           boolean not null default false,                -- takes no new sandboxes
  address            text,                                          -- host:port of the agent
  cert_fingerprint   text  -- SHA-256 of the agent's certificate, pinned
                     constraint hosts_cert_fingerprint_form check (cert_fingerprint ~ '^[0-9a-f]{64}$'),
  arch               text,
  cpu_cores          integer constraint hosts_cpu_cores check (cpu_cores > 0),
  memory_mb          integer constraint hosts_memory_mb check (memory_mb > 0),
  disk_gb            integer constraint hosts_disk_gb check (disk_gb > 0),
  last_heartbeat     timestamptz,
  generation         bigint not null default 1,                     -- grows with each change of status
  credential_epoch   integer not null default 0,                    -- grows with each registration
  created_at         timestamptz not null default now(),
  deleted_at         timestamptz,
  -- Target of sandboxes_live_host: true or null, so that a deleted host can be referred to by finished sandboxes only.
  alive              boolean generated always as (case when deleted_at is null then true end) stored,
  constraint hosts_byoc_has_team check ((type = 'byoc') = (team_id is not null)),
  constraint hosts_registered check (
    status = 'pending'
    or (address is not null and cert_fingerprint is not null and arch is not null
        and cpu_cores is not null and memory_mb is not null and disk_gb is not null)),
  constraint hosts_alive_key unique (id, alive)
);
-- No host can take the address or the certificate of another that lives.
create unique index if not exists hosts_address_key on hosts (lower(address)) where deleted_at is null;
create unique index if not exists hosts_cert_fingerprint_key on hosts (cert_fingerprint) where deleted_at is null;
create index if not exists hosts_team_id on hosts (team_id) where deleted_at is null;

create or replace function hosts_count_generation() returns trigger language plpgsql as $$
begin
  if (new.status <> old.status and new.generation <> old.generation + 1)
     or (new.status = old.status and new.generation <> old.generation) then
    raise exception 'host %: generation % -> % with status % -> %',
      old.id, old.generation, new.generation, old.status, new.status
      using errcode = '23514', constraint = 'hosts_generation', table = 'hosts';
  end if;
  return new;
end $$;
create or replace trigger hosts_generation before update on hosts
  for each row when (new.status <> old.status or new.generation <> old.generation)
  execute function hosts_count_generation();

create table if not exists host_tags (
  host_id  uuid not null constraint host_tags_host references hosts on delete cascade,
  tag      text not null constraint host_tags_form check (tag ~ '^[a-zA-Z0-9][a-zA-Z0-9._:=-]{0,63}$'),
  constraint host_tags_pkey primary key (host_id, tag)
);

create table if not exists host_registration_tokens (
  id          uuid primary key default gen_random_uuid(),
  host_id     uuid not null constraint host_registration_tokens_host references hosts on delete cascade,
  sha256      bytea not null constraint host_registration_tokens_sha256_length check (octet_length(sha256) = 32),
  created_by  uuid constraint host_registration_tokens_creator references users on delete set null,
  created_at  timestamptz not null default now(),
  expires_at  timestamptz not null,
  used_at     timestamptz,
  constraint host_registration_tokens_sha256_key unique (sha256)
);
create index if not exists host_registration_tokens_host_id on host_registration_tokens (host_id);

create table if not exists host_refresh_tokens (
  id             uuid primary key default gen_random_uuid(),
  host_id        uuid not null constraint host_refresh_tokens_host references hosts on delete cascade,
  family         uuid not null,                   -- all tokens that descend from one registration
  sha256         bytea not null constraint host_refresh_tokens_sha256_length check (octet_length(sha256) = 32),
  created_at     timestamptz not null default now(),
  expires_at     timestamptz not null,
  superseded_at  timestamptz,                     -- spent: a newer one of the family was issued
  revoked_at     timestamptz,
  constraint host_refresh_tokens_sha256_key unique (sha256)
);
create index if not exists host_refresh_tokens_family on host_refresh_tokens (family);
create index if not exists host_refresh_tokens_host_id on host_refresh_tokens (host_id);
create unique index if not exists host_refresh_tokens_one_current on host_refresh_tokens (family)
  where superseded_at is null and revoked_at is null;

create table if not exists certificate_authority (
  id          smallint primary key default 1 constraint certificate_authority_single_row check (id = 1),
  cert_pem    text not null,
  key_pem     text not null,                      -- PKCS#8, encrypted before it comes here
  created_at  timestamptz not null default now()
);
