-- Accounts, sessions, sign-in through providers, limits of teams, permissions of platform admins, paging the audit.

-- The one session that outlives a change of password: the one that changed it.
alter table users add column if not exists kept_session uuid;

-- Logged after all: a crash of the server must not give an attacker his attempts back.
alter table rate_limits set logged;

-- A state that came back from a provider comes back once.
create table if not exists spent_oauth_states (
  sha256      bytea primary key constraint spent_oauth_states_sha256 check (octet_length(sha256) = 32),
  expires_at  timestamptz not null                -- the state's own end; the row is of no use after it
);
create index if not exists spent_oauth_states_expires_at on spent_oauth_states (expires_at);
create index if not exists login_codes_expires_at on login_codes (expires_at);

-- What a platform admin may do; users.is_admin alone grants nothing.
create table if not exists admin_permissions (
  user_id     uuid not null constraint admin_permissions_user references users on delete cascade,
  permission  text not null constraint admin_permissions_permission
              check (permission in ('hosts', 'byoc', 'directory', 'templates')),
  granted_at  timestamptz not null default now(),
  constraint admin_permissions_pkey primary key (user_id, permission)
);
insert into admin_permissions (user_id, permission)
select id, permission from users cross join unnest(array['hosts', 'byoc', 'directory', 'templates']) as permission
where is_admin
on conflict do nothing;

alter table teams add column if not exists max_members integer not null default 500
  constraint teams_max_members check (max_members >= 1);
alter table teams add column if not exists max_api_keys integer not null default 200
  constraint teams_max_api_keys check (max_api_keys >= 0);

-- A key belongs to whoever sent it: a team, a user without one, or an address that is about to become a user.
alter table idempotency_keys drop constraint if exists idempotency_keys_team;
do $$ begin
  if exists (select from information_schema.columns
             where table_schema = current_schema and table_name = 'idempotency_keys' and column_name = 'team_id') then
    alter table idempotency_keys rename column team_id to owner_id;
  end if;
  -- Since PostgreSQL 18 "not null" has a name, which the column's old one is part of.
  if exists (select from pg_constraint where conname = 'idempotency_keys_team_id_not_null') then
    alter table idempotency_keys rename constraint idempotency_keys_team_id_not_null
      to idempotency_keys_owner_id_not_null;
  end if;
end $$;

-- Every filter of the trail is a choice among the few (scope, resource_type, action) that a team has. Each of them is a
-- range of this index that ends like the page's order; the list of them is read from it, too.
create index if not exists audit_logs_kind
  on audit_logs (team_id, scope, resource_type, action, created_at desc, id desc);

-- Only keys that live are listed and counted, however many a team has revoked.
create index if not exists api_keys_live on api_keys (team_id, created_at desc, id desc) where revoked_at is null;
drop index if exists api_keys_team_id;

-- Pages of everything, for platform admins.
create index if not exists users_page on users (created_at desc, id desc);
create index if not exists teams_page on teams (created_at desc, id desc);
