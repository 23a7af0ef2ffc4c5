-- A host's certificate before its last renewal: pinned, too, for as long as the agent may still show it.

alter table hosts add column if not exists earlier_cert_fingerprint text
  constraint hosts_earlier_cert_fingerprint_form check (earlier_cert_fingerprint ~ '^[0-9a-f]{64}$');
