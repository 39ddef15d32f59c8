-- Delete jobs that claim_bare_jobs has claimed: no history, no fencing. Locks: them. Index: jobs_pkey.
DELETE FROM {schema}.jobs WHERE id = ANY (%(ids)s::uuid[])
