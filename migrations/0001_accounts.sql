-- Bookkeeping of the migrations themselves, users, teams, keys.

create table if not exists schema_migrations (
  name        text primary key,
  sha256      bytea not null,
  applied_at  timestamptz not null default now()
);

create table if not exists users (
  id             uuid primary key default gen_random_uuid(),
  email          text not null
                 constraint users_email_form check (email ~ '^[^@[:space:]]+@[^@[:space:]]+$' and length(email) <= 320),
  name           text not null constraint users_name_length check (length(name) between 1 and 128),
  password_hash  text,                            -- argon2id; null = signs in through a provider only
  is_admin       boolean not null default false,  -- platform admin
  -- Sessions issued before this moment are dead: changing the password ends the other ones.
  sessions_valid_from  timestamptz not null default '-infinity',
  created_at     timestamptz not null default now()
);
-- One account per address, whatever the case; the pattern class also serves the search by prefix in any locale.
create unique index if not exists users_email_key on users (lower(email) text_pattern_ops);

create table if not exists oauth_identities (
  provider    text not null,
  subject     text not null,                      -- the provider's id of the account, never its e-mail
  user_id     uuid not null constraint oauth_identities_user references users on delete cascade,
  created_at  timestamptz not null default now(),
  constraint oauth_identities_pkey primary key (provider, subject)
);
create index if not exists oauth_identities_user_id on oauth_identities (user_id);

-- What the OAuth callback hands to the page instead of a session token, exchanged once by POST.
create table if not exists login_codes (
  sha256      bytea primary key constraint login_codes_sha256 check (octet_length(sha256) = 32),
  user_id     uuid not null constraint login_codes_user references users on delete cascade,
  created_at  timestamptz not null default now(),
  expires_at  timestamptz not null,
  used_at     timestamptz
);

create table if not exists revoked_sessions (
  jti         uuid primary key,
  user_id     uuid not null constraint revoked_sessions_user references users on delete cascade,
  revoked_at  timestamptz not null default now(),
  expires_at  timestamptz not null                -- the token's own end; the row is of no use after it
);
create index if not exists revoked_sessions_expires_at on revoked_sessions (expires_at);

-- Unlogged: emptied by a crash of the server, which costs an attacker's counter and saves every request a WAL record.
create unlogged table if not exists rate_limits (
  bucket        text not null,                    -- rule and subject, for example login:address:192.0.2.7
  window_start  timestamptz not null,
  hits          integer not null,
  constraint rate_limits_pkey primary key (bucket, window_start)
);
create index if not exists rate_limits_window_start on rate_limits (window_start);

create table if not exists teams (
  id             uuid primary key default gen_random_uuid(),
  name           text not null constraint teams_name_form check (name ~ '^[A-Za-z0-9 _@''-]{1,128}$'),
  slug           text not null constraint teams_slug_form check (slug ~ '^[0-9a-f]{6}-[0-9a-f]{6}$'),
  is_byoc        boolean not null default false,
  -- max_sandboxes counts; the other two bound a single sandbox.
  max_sandboxes  integer not null default 1000 constraint teams_max_sandboxes check (max_sandboxes >= 0),
  max_vcpus      integer not null default 8 constraint teams_max_vcpus check (max_vcpus >= 1),
  max_memory_mb  integer not null default 16384 constraint teams_max_memory_mb check (max_memory_mb >= 1),
  created_at     timestamptz not null default now(),
  deleted_at     timestamptz,
  constraint teams_platform_lives check (id <> '00000000-0000-0000-0000-000000000000' or deleted_at is null),
  -- Over deleted teams too: a slug is never given out twice.
  constraint teams_slug_key unique (slug)
);

-- The platform itself: owner of base templates. It has no members.
insert into teams (id, name, slug) values ('00000000-0000-0000-0000-000000000000', 'Platform', '000000-000000')
on conflict do nothing;

create table if not exists memberships (
  team_id     uuid not null constraint memberships_team references teams,
  user_id     uuid not null constraint memberships_user references users on delete cascade,
  role        text not null constraint memberships_role check (role in ('owner', 'admin', 'member')),
  is_default  boolean not null default false,
  joined_at   timestamptz not null default now(),
  constraint memberships_pkey primary key (team_id, user_id),
  constraint memberships_not_platform check (team_id <> '00000000-0000-0000-0000-000000000000')
);
create index if not exists memberships_user_id on memberships (user_id);
create unique index if not exists memberships_one_owner on memberships (team_id) where role = 'owner';
create unique index if not exists memberships_one_default on memberships (user_id) where is_default;

create or replace function teams_keep_slug() returns trigger language plpgsql as $$
begin
  raise exception 'a slug is for ever' using errcode = '23514', constraint = 'teams_slug_fixed', table = 'teams';
end $$;
create or replace trigger teams_slug_fixed before update on teams
  for each row when (new.slug <> old.slug or new.id <> old.id) execute function teams_keep_slug();

-- The other half of "exactly one owner": looked at when the transaction commits, so that creating a team or handing
-- it over may take several statements.
create or replace function teams_need_owner() returns trigger language plpgsql as $$
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
drop trigger if exists teams_have_owner on teams;
create constraint trigger teams_have_owner after insert or update of deleted_at on teams
  deferrable initially deferred for each row execute function teams_need_owner();
drop trigger if exists memberships_have_owner on memberships;
create constraint trigger memberships_have_owner after update or delete on memberships
  deferrable initially deferred for each row execute function teams_need_owner();

create table if not exists api_keys (
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
create index if not exists api_keys_team_id on api_keys (team_id, created_at desc);

create table if not exists idempotency_keys (
  team_id         uuid not null constraint idempotency_keys_team references teams,
  key             text not null constraint idempotency_keys_key_length check (length(key) between 1 and 255),
  endpoint        text not null,                  -- method and path, for example POST /v1/sandboxes
  request_sha256  bytea not null constraint idempotency_keys_sha256_length check (octet_length(request_sha256) = 32),
  resource_id     uuid not null,                  -- what the first request made or is still making
  created_at      timestamptz not null default now(),
  constraint idempotency_keys_pkey primary key (team_id, key)
);
create index if not exists idempotency_keys_created_at on idempotency_keys (created_at);
