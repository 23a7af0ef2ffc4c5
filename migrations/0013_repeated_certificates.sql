-- The certificates of answers to one and the same refresh: the agent may have got any of them, so all stay pinned.

alter table hosts add column if not exists repeated_cert_fingerprints text[] not null default '{}'
  constraint hosts_repeated_cert_fingerprints_few check (cardinality(repeated_cert_fingerprints) <= 8);
