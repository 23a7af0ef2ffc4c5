-- An address is proven before it is held: the control plane has reached the agent with the pinned certificate there.
-- Stolen credentials end.

do $$ begin
  if not exists (select from information_schema.columns
                 where table_schema = current_schema and table_name = 'hosts' and column_name = 'proven_epoch') then
    alter table hosts add column proven_epoch integer not null default 0;   -- the registration whose address is proven
    update hosts set proven_epoch = credential_epoch where status <> 'pending';
  end if;
end $$;
alter table hosts add column if not exists credentials_revoked_at timestamptz;   -- until it registers anew

do $$ begin
  if not exists (select from pg_constraint where conname = 'hosts_proven_epoch') then
    alter table hosts add constraint hosts_proven_epoch check (proven_epoch between 0 and credential_epoch);
  end if;
  if not exists (select from pg_constraint where conname = 'hosts_online_is_proven') then
    alter table hosts add constraint hosts_online_is_proven
      check (status <> 'online' or (proven_epoch = credential_epoch and credentials_revoked_at is null));
  end if;
end $$;

-- No host can take the address of another that is there; a mere claim holds nothing.
drop index if exists hosts_address_key;
create unique index hosts_address_key on hosts (lower(address))
  where deleted_at is null and proven_epoch = credential_epoch;
