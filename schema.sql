-- The database of the whole product, as it is today. This file is the truth for a reader; migrations/ brings any
-- older database here, and tests/db/test_migrations.py proves that both give the same catalog.
--
-- Changing it: edit this file, add migrations/NNNN_what.sql that can be run twice, never touch an applied one.
-- New columns go last in their table, as ALTER TABLE puts them.
--
-- Conventions: keys are UUIDs; times are timestamptz (microseconds, UTC); secrets are stored as the 32 bytes of their
-- SHA-256; every constraint has a name, which is what the code sees when it is broken (ConstraintViolated.name).
-- No extension is used: the embedded server has neither pgcrypto nor ICU.

-- ---------------------------------------------------------------- bookkeeping

create table schema_migrations (
  name        text primary key,
  sha256      bytea not null,
  applied_at  timestamptz not null default now()
);

-- ---------------------------------------------------------------- users and teams

create table users (
  id             uuid primary key default gen_random_uuid(),
  email          text not null
                 constraint users_email_form check (email ~ '^[^@[:space:]]+@[^@[:space:]]+$' and length(email) <= 320),
  name           text not null constraint users_name_length check (length(name) between 1 and 128),
  password_hash  text,                            -- argon2id; null = signs in through a provider only
  is_admin       boolean not null default false,  -- platform admin
  -- Sessions issued before this moment are dead: changing the password ends the other ones.
  sessions_valid_from  timestamptz not null default '-infinity',
  created_at     timestamptz not null default now(),
  -- The one session that outlives a change of password: the one that changed it.
  kept_session   uuid
);
-- One account per address, whatever the case; the pattern class also serves the search by prefix in any locale.
create unique index users_email_key on users (lower(email) text_pattern_ops);
create index users_page on users (created_at desc, id desc);

create table oauth_identities (
  provider    text not null,
  subject     text not null,                      -- the provider's id of the account, never its e-mail
  user_id     uuid not null constraint oauth_identities_user references users on delete cascade,
  created_at  timestamptz not null default now(),
  constraint oauth_identities_pkey primary key (provider, subject)
);
create index oauth_identities_user_id on oauth_identities (user_id);

-- What the OAuth callback hands to the page instead of a session token, exchanged once by POST.
create table login_codes (
  sha256      bytea primary key constraint login_codes_sha256 check (octet_length(sha256) = 32),
  user_id     uuid not null constraint login_codes_user references users on delete cascade,
  created_at  timestamptz not null default now(),
  expires_at  timestamptz not null,
  used_at     timestamptz
);
create index login_codes_expires_at on login_codes (expires_at);

-- A state that came back from a provider comes back once.
create table spent_oauth_states (
  sha256      bytea primary key constraint spent_oauth_states_sha256 check (octet_length(sha256) = 32),
  expires_at  timestamptz not null                -- the state's own end; the row is of no use after it
);
create index spent_oauth_states_expires_at on spent_oauth_states (expires_at);

-- What a platform admin may do; users.is_admin alone grants nothing.
create table admin_permissions (
  user_id     uuid not null constraint admin_permissions_user references users on delete cascade,
  permission  text not null constraint admin_permissions_permission
              check (permission in ('hosts', 'byoc', 'directory', 'templates')),
  granted_at  timestamptz not null default now(),
  constraint admin_permissions_pkey primary key (user_id, permission)
);

create table revoked_sessions (
  jti         uuid primary key,
  user_id     uuid not null constraint revoked_sessions_user references users on delete cascade,
  revoked_at  timestamptz not null default now(),
  expires_at  timestamptz not null                -- the token's own end; the row is of no use after it
);
create index revoked_sessions_expires_at on revoked_sessions (expires_at);

-- Logged: a crash of the server must not give an attacker his attempts back.
create table rate_limits (
  bucket        text not null,                    -- rule and subject, for example login:address:192.0.2.7
  window_start  timestamptz not null,
  hits          integer not null,
  constraint rate_limits_pkey primary key (bucket, window_start)
);
create index rate_limits_window_start on rate_limits (window_start);

create table teams (
  id             uuid primary key default gen_random_uuid(),
  name           text not null constraint teams_name_form check (name ~ '^[A-Za-z0-9 _@''-]{1,128}$'),
  slug           text not null constraint teams_slug_form check (slug ~ '^[0-9a-f]{6}-[0-9a-f]{6}$'),
  is_byoc        boolean not null default false,
  -- max_vcpus and max_memory_mb bound a single sandbox; the others count.
  max_sandboxes  integer not null default 1000 constraint teams_max_sandboxes check (max_sandboxes >= 0),
  max_vcpus      integer not null default 8 constraint teams_max_vcpus check (max_vcpus >= 1),
  max_memory_mb  integer not null default 16384 constraint teams_max_memory_mb check (max_memory_mb >= 1),
  created_at     timestamptz not null default now(),
  deleted_at     timestamptz,
  max_templates  integer not null default 200 constraint teams_max_templates check (max_templates >= 0),
  max_members    integer not null default 500 constraint teams_max_members check (max_members >= 1),
  max_api_keys   integer not null default 200 constraint teams_max_api_keys check (max_api_keys >= 0),
  constraint teams_platform_lives check (id <> '00000000-0000-0000-0000-000000000000' or deleted_at is null),
  -- Over deleted teams too: a slug is never given out twice.
  constraint teams_slug_key unique (slug)
);
create index teams_page on teams (created_at desc, id desc);

-- The platform itself: owner of base templates. It has no members.
insert into teams (id, name, slug) values ('00000000-0000-0000-0000-000000000000', 'Platform', '000000-000000');

create table memberships (
  team_id     uuid not null constraint memberships_team references teams,
  user_id     uuid not null constraint memberships_user references users on delete cascade,
  role        text not null constraint memberships_role check (role in ('owner', 'admin', 'member')),
  is_default  boolean not null default false,
  joined_at   timestamptz not null default now(),
  constraint memberships_pkey primary key (team_id, user_id),
  constraint memberships_not_platform check (team_id <> '00000000-0000-0000-0000-000000000000')
);
create index memberships_user_id on memberships (user_id);
create unique index memberships_one_owner on memberships (team_id) where role = 'owner';
create unique index memberships_one_default on memberships (user_id) where is_default;

create function teams_keep_slug() returns trigger language plpgsql as $$
begin
  raise exception 'a slug is for ever' using errcode = '23514', constraint = 'teams_slug_fixed', table = 'teams';
end $$;
create trigger teams_slug_fixed before update on teams
  for each row when (new.slug <> old.slug or new.id <> old.id) execute function teams_keep_slug();

-- The other half of "exactly one owner": looked at when the transaction commits, so that creating a team or handing
-- it over may take several statements.
create function teams_need_owner() returns trigger language plpgsql as $$
declare
  team uuid;
begin
  if tg_table_name = 'teams' then team := new.id; else team := old.team_id; end if;
  if exists (select from teams where id = team and deleted_at is null and id <> '00000000-0000-0000-0000-000000000000')
     and not exists (select from memberships where team_id = team and role = 'owner') then
    raise exception 'team % has no owner', team
      using errcode = '23514', constraint = 'teams_have_owner', table = 'memberships';
  end if;
  return null;
end $$;
create constraint trigger teams_have_owner after insert or update of deleted_at on teams
  deferrable initially deferred for each row execute function teams_need_owner();
create constraint trigger memberships_have_owner after update or delete on memberships
  deferrable initially deferred for each row execute function teams_need_owner();

create table api_keys (
  id            uuid primary key default gen_random_uuid(),
  team_id       uuid not null constraint api_keys_team references teams,
  created_by    uuid constraint api_keys_creator references users on delete set null,
  name          text not null constraint api_keys_name_length check (length(name) between 1 and 128),
  prefix        text not null constraint api_keys_prefix_length check (length(prefix) = 12),
  sha256        bytea not null constraint api_keys_sha256_length check (octet_length(sha256) = 32),
  created_at    timestamptz not null default now(),
  last_used_at  timestamptz,
  revoked_at    timestamptz,
  constraint api_keys_sha256_key unique (sha256)
);
-- Only keys that live are listed and counted, however many a team has revoked.
create index api_keys_live on api_keys (team_id, created_at desc, id desc) where revoked_at is null;

create table idempotency_keys (
  owner_id        uuid not null,                  -- whose key it is: a team's, a user's, an address's before it is one
  key             text not null constraint idempotency_keys_key_length check (length(key) between 1 and 255),
  endpoint        text not null,                  -- method and path, for example POST /v1/sandboxes
  request_sha256  bytea not null constraint idempotency_keys_sha256_length check (octet_length(request_sha256) = 32),
  resource_id     uuid not null,                  -- what the first request made or is still making
  created_at      timestamptz not null default now(),
  constraint idempotency_keys_pkey primary key (owner_id, key)
);
create index idempotency_keys_created_at on idempotency_keys (created_at);

-- ---------------------------------------------------------------- hosts

create table hosts (
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
  -- The registration whose address is proven: the agent with the pinned certificate was reached there.
  proven_epoch       integer not null default 0,
  credentials_revoked_at  timestamptz,                              -- stolen ones ended; until it registers anew
  -- Of before the last renewal: also pinned, since the answer with the new one may have been lost.
  earlier_cert_fingerprint  text
                     constraint hosts_earlier_cert_fingerprint_form check (earlier_cert_fingerprint ~ '^[0-9a-f]{64}$'),
  -- Of other answers to the last refresh, newest first: which of them the agent got, nobody knows.
  repeated_cert_fingerprints text[] not null default '{}'
                     constraint hosts_repeated_cert_fingerprints_few check (cardinality(repeated_cert_fingerprints) <= 8),
  constraint hosts_byoc_has_team check ((type = 'byoc') = (team_id is not null)),
  constraint hosts_registered check (
    status = 'pending'
    or (address is not null and cert_fingerprint is not null and arch is not null
        and cpu_cores is not null and memory_mb is not null and disk_gb is not null)),
  constraint hosts_alive_key unique (id, alive),
  constraint hosts_proven_epoch check (proven_epoch between 0 and credential_epoch),
  constraint hosts_online_is_proven
    check (status <> 'online' or (proven_epoch = credential_epoch and credentials_revoked_at is null))
);
-- No host can take the address of another that is there (a mere claim holds nothing), or the certificate of one that
-- lives.
create unique index hosts_address_key on hosts (lower(address))
  where deleted_at is null and proven_epoch = credential_epoch;
create unique index hosts_cert_fingerprint_key on hosts (cert_fingerprint) where deleted_at is null;
create index hosts_team_id on hosts (team_id) where deleted_at is null;

create function hosts_count_generation() returns trigger language plpgsql as $$
begin
  if (new.status <> old.status and new.generation <> old.generation + 1)
     or (new.status = old.status and new.generation <> old.generation) then
    raise exception 'host %: generation % -> % with status % -> %',
      old.id, old.generation, new.generation, old.status, new.status
      using errcode = '23514', constraint = 'hosts_generation', table = 'hosts';
  end if;
  return new;
end $$;
create trigger hosts_generation before update on hosts
  for each row when (new.status <> old.status or new.generation <> old.generation)
  execute function hosts_count_generation();

create table host_tags (
  host_id  uuid not null constraint host_tags_host references hosts on delete cascade,
  tag      text not null constraint host_tags_form check (tag ~ '^[a-zA-Z0-9][a-zA-Z0-9._:=-]{0,63}$'),
  constraint host_tags_pkey primary key (host_id, tag)
);

-- Hosts that are being deleted with their sandboxes: cordoned, and deleted by anybody once it is due.
create table host_removals (
  host_id  uuid constraint host_removals_pkey primary key
           constraint host_removals_host references hosts on delete cascade,
  due_at   timestamptz not null
);
create index host_removals_due_at on host_removals (due_at);

create table host_registration_tokens (
  id          uuid primary key default gen_random_uuid(),
  host_id     uuid not null constraint host_registration_tokens_host references hosts on delete cascade,
  sha256      bytea not null constraint host_registration_tokens_sha256_length check (octet_length(sha256) = 32),
  created_by  uuid constraint host_registration_tokens_creator references users on delete set null,
  created_at  timestamptz not null default now(),
  expires_at  timestamptz not null,
  used_at     timestamptz,
  constraint host_registration_tokens_sha256_key unique (sha256)
);
create index host_registration_tokens_host_id on host_registration_tokens (host_id);

create table host_refresh_tokens (
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
create index host_refresh_tokens_family on host_refresh_tokens (family);
create index host_refresh_tokens_host_id on host_refresh_tokens (host_id);
create unique index host_refresh_tokens_one_current on host_refresh_tokens (family)
  where superseded_at is null and revoked_at is null;

create table certificate_authority (
  id          smallint primary key default 1 constraint certificate_authority_single_row check (id = 1),
  cert_pem    text not null,
  key_pem     text not null,                      -- PKCS#8, encrypted before it comes here
  created_at  timestamptz not null default now()
);

-- ---------------------------------------------------------------- templates and sandboxes

create table templates (
  id          uuid primary key default gen_random_uuid(),                 -- of a snapshot: its id on the hosts, too
  team_id     uuid not null constraint templates_team references teams,   -- the platform team's are everyone's
  name        text not null constraint templates_name_form check (name ~ '^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$'),
  type        text not null constraint templates_type check (type in ('base', 'snapshot')),
  vcpus       integer constraint templates_vcpus check (vcpus > 0),
  memory_mb   integer constraint templates_memory_mb check (memory_mb > 0),
  size_bytes  bigint not null default 0 constraint templates_size_bytes check (size_bytes >= 0),
  created_at  timestamptz not null default now(),
  deleted_at  timestamptz,
  disk_mb     integer constraint templates_disk_mb check (disk_mb > 0),   -- of a snapshot
  constraint templates_base_is_platform check (type <> 'base' or team_id = '00000000-0000-0000-0000-000000000000'),
  constraint templates_snapshot_fixes_size check (type <> 'snapshot' or (vcpus is not null and memory_mb is not null))
);
create unique index templates_name_key on templates (team_id, name) where deleted_at is null;

-- Where copies of a template lie. Deleting a template ends when its last row here is gone.
create table template_hosts (
  template_id  uuid not null constraint template_hosts_template references templates on delete cascade,
  host_id      uuid not null constraint template_hosts_host references hosts on delete cascade,
  created_at   timestamptz not null default now(),
  lost_at      timestamptz,                       -- the host said that it has it no longer
  constraint template_hosts_pkey primary key (template_id, host_id)
);
create index template_hosts_host_id on template_hosts (host_id);

create table sandboxes (
  id                   uuid primary key,
  team_id              uuid not null constraint sandboxes_team references teams,
  host_id              uuid constraint sandboxes_host references hosts,
  template             text not null,             -- its name when the sandbox was made
  template_id          uuid constraint sandboxes_template references templates,
  vcpus                integer not null constraint sandboxes_vcpus check (vcpus > 0),
  memory_mb            integer not null constraint sandboxes_memory_mb check (memory_mb > 0),
  disk_mb              integer not null constraint sandboxes_disk_mb check (disk_mb > 0),
  -- Seconds of idleness after which it is paused; 0 = never.
  timeout_sec          integer not null default 0 constraint sandboxes_timeout_sec check (timeout_sec >= 0),
  status               text not null default 'pending' constraint sandboxes_status check (status in (
                         'pending', 'starting', 'running', 'pausing', 'paused', 'resuming', 'stopping', 'stopped',
                         'missing', 'error')),
  generation           bigint not null default 1, -- grows by one with each change of status
  host_ip              inet,
  metadata             jsonb not null default '{}'
                       constraint sandboxes_metadata_object check (jsonb_typeof(metadata) = 'object'),
  reason               text,                      -- why it is in this status, for people
  created_at           timestamptz not null default clock_timestamp(),
  started_at           timestamptz,
  last_active_at       timestamptz,
  last_updated         timestamptz not null default clock_timestamp(),
  -- When someone must look after a row that has not got on; every row on its way has one, no other has.
  transition_deadline  timestamptz,
  -- True while the sandbox lives or rests on its host, else null: then sandboxes_live_host asks nothing.
  needs_host           boolean generated always as (
                         case when host_id is not null and status not in ('stopped', 'error') then true end) stored,
  constraint sandboxes_has_host check (
    host_id is not null or status in ('pending', 'stopping', 'stopped', 'error')),
  constraint sandboxes_deadline_while_on_its_way check (
    (transition_deadline is not null) = (status in ('pending', 'starting', 'pausing', 'resuming', 'stopping'))),
  constraint sandboxes_no_slot_at_rest check (
    host_ip is null or status not in ('pending', 'paused', 'stopped', 'error')),
  -- A host with sandboxes that live or rest there cannot be deleted, and a deleted one gets none.
  constraint sandboxes_live_host foreign key (host_id, needs_host) references hosts (id, alive)
) with (fillfactor = 80);
create index sandboxes_page on sandboxes (team_id, created_at desc, id desc);
create index sandboxes_live_page on sandboxes (team_id, created_at desc, id desc)
  where status not in ('stopped', 'error');
create index sandboxes_host_id on sandboxes (host_id) where status not in ('stopped', 'error');
create index sandboxes_transition_deadline on sandboxes (transition_deadline)
  where transition_deadline is not null;
create index sandboxes_template_id on sandboxes (template_id) where status not in ('stopped', 'error');

-- The one table of allowed changes of status (agent/wire/lifecycle.py has the same one). stopped and error are final: they are in no first column.
create table sandbox_transitions (
  from_status  text not null,
  to_status    text not null,
  constraint sandbox_transitions_pkey primary key (from_status, to_status)
);
insert into sandbox_transitions (from_status, to_status) values
  ('pending', 'starting'), ('pending', 'stopping'), ('pending', 'error'),
  ('starting', 'running'), ('starting', 'stopping'), ('starting', 'missing'), ('starting', 'error'),
  ('running', 'pausing'), ('running', 'stopping'), ('running', 'missing'), ('running', 'error'),
  -- back to running: the pause failed and the VM lives
  ('pausing', 'paused'), ('pausing', 'running'), ('pausing', 'stopping'), ('pausing', 'missing'), ('pausing', 'error'),
  ('paused', 'resuming'), ('paused', 'stopping'), ('paused', 'missing'), ('paused', 'error'),
  -- back to paused: the resume failed and was undone
  ('resuming', 'running'), ('resuming', 'paused'), ('resuming', 'stopping'),
  ('resuming', 'missing'), ('resuming', 'error'),
  ('stopping', 'stopped'), ('stopping', 'missing'), ('stopping', 'error'),
  -- its host is back and said what became of it
  ('missing', 'running'), ('missing', 'paused'), ('missing', 'stopping'), ('missing', 'stopped'), ('missing', 'error');

create function sandboxes_begin() returns trigger language plpgsql as $$
begin
  if new.status <> 'pending' or new.generation <> 1 then
    raise exception 'sandbox % must begin as pending with generation 1', new.id
      using errcode = '23514', constraint = 'sandboxes_begin_pending', table = 'sandboxes';
  end if;
  -- The lock makes this and the deletion of the team one after the other.
  perform from teams where id = new.team_id and deleted_at is null for share;
  if not found then
    raise exception 'team % is gone', new.team_id
      using errcode = '23514', constraint = 'sandboxes_team_alive', table = 'sandboxes';
  end if;
  return new;
end $$;
create trigger sandboxes_begin before insert on sandboxes for each row execute function sandboxes_begin();

create function sandboxes_change_status() returns trigger language plpgsql as $$
declare
  -- A host that has no room for what it was to start: another one may have, and the row goes there.
  moved boolean := old.status = 'starting' and new.status = 'starting' and new.host_id <> old.host_id;
begin
  if (new.status = old.status and not moved) or new.generation <> old.generation + 1 then
    raise exception 'sandbox %: generation % -> % with status % -> %',
      old.id, old.generation, new.generation, old.status, new.status
      using errcode = '23514', constraint = 'sandboxes_generation', table = 'sandboxes';
  end if;
  if not moved
     and not exists (select from sandbox_transitions where from_status = old.status and to_status = new.status) then
    raise exception 'sandbox %: % cannot become %', old.id, old.status, new.status
      using errcode = '23514', constraint = 'sandboxes_transition', table = 'sandboxes';
  end if;
  return new;
end $$;
create trigger sandboxes_change_status before update on sandboxes
  for each row when (new.status <> old.status or new.generation <> old.generation)
  execute function sandboxes_change_status();

create function sandboxes_keep_identity() returns trigger language plpgsql as $$
begin
  raise exception 'sandbox %: id, team and time of creation are fixed, and so is its host once it has started', old.id
    using errcode = '23514', constraint = 'sandboxes_identity', table = 'sandboxes';
end $$;
create trigger sandboxes_identity before update on sandboxes
  for each row when (new.id <> old.id or new.team_id <> old.team_id or new.created_at <> old.created_at
                     or (old.host_id is not null and new.host_id is distinct from old.host_id
                         and (new.host_id is null or old.status <> 'starting' or new.status <> 'starting'
                              or new.generation <> old.generation + 1)))
  execute function sandboxes_keep_identity();

-- ---------------------------------------------------------------- audit

-- No foreign keys: writing a row never fails the action it tells of, and outlives everything it names.
create table audit_logs (
  id             uuid primary key default gen_random_uuid(),
  team_id        uuid,                            -- null: of no team, such as a failed login
  actor_type     text not null constraint audit_logs_actor_type check (actor_type in ('user', 'api_key', 'system')),
  actor_id       uuid,
  actor_name     text not null default '',
  resource_type  text not null,
  resource_id    text not null,
  action         text not null,
  scope          text not null constraint audit_logs_scope check (scope in ('team', 'admin')),
  status         text not null constraint audit_logs_status check (status in ('success', 'info', 'warning', 'error')),
  metadata       jsonb not null default '{}'
                 constraint audit_logs_metadata_object check (jsonb_typeof(metadata) = 'object'),
  created_at     timestamptz not null default clock_timestamp(),
  constraint audit_logs_actor check ((actor_type = 'system') = (actor_id is null) or action = 'login_failed')
);
create index audit_logs_page on audit_logs (team_id, created_at desc, id desc);
-- Every filter of the trail is a choice among the few (scope, resource_type, action) that a team has. Each of them is a
-- range of this index that ends like the page's order; the list of them is read from it, too.
create index audit_logs_kind on audit_logs (team_id, scope, resource_type, action, created_at desc, id desc);

create function audit_logs_refuse() returns trigger language plpgsql as $$
begin
  raise exception 'audit_logs is append-only'
    using errcode = '23514', constraint = 'audit_logs_append_only', table = 'audit_logs';
end $$;
create trigger audit_logs_append_only before update or delete or truncate on audit_logs
  for each statement execute function audit_logs_refuse();

-- ---------------------------------------------------------------- metrics

create table sandbox_metrics (
  sandbox_id  uuid not null constraint sandbox_metrics_sandbox references sandboxes on delete cascade,
  sampled_at  timestamptz not null,
  cpu_pct     real not null,
  mem_bytes   bigint not null,
  disk_bytes  bigint not null,
  constraint sandbox_metrics_pkey primary key (sandbox_id, sampled_at)
);
create index sandbox_metrics_sampled_at on sandbox_metrics using brin (sampled_at);

create table team_samples (
  team_id             uuid not null constraint team_samples_team references teams,
  sampled_at          timestamptz not null,
  running_count       integer not null,
  vcpus_reserved      integer not null,
  memory_mb_reserved  bigint not null,
  constraint team_samples_pkey primary key (team_id, sampled_at)
);
create index team_samples_sampled_at on team_samples using brin (sampled_at);
