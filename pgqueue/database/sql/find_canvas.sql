-- What became of a canvas: that of its output; the error is that of the job at fault. By primary keys.
-- value: the result too, if it is of a size that can be sent. No row: never committed, or pruned.
SELECT {schema}.canvas_state(o.id) AS state,
       CASE WHEN o.state = 'succeeded' AND size.fits THEN {schema}.canvas_value(o.id)::text END AS result,
       CASE WHEN o.state <> 'succeeded' THEN NULL WHEN o.error IS NOT NULL THEN o.error
            WHEN NOT size.fits THEN 'together the results of its jobs are over 64,000,000 bytes; read them one by one' END AS result_error,
       CASE WHEN o.state = 'dead' THEN coalesce(d.reason, 'member_failed') END AS reason, d.error_class,
       coalesce(d.error_message, CASE WHEN o.state = 'dead' THEN {schema}.canvas_fault(o) END) AS error_message, d.traceback,
       o.cause::text AS fault
FROM {schema}.canvases c JOIN {schema}.canvas_nodes o ON o.id = c.output
LEFT JOIN {schema}.dead_letters d ON d.id = o.cause AND o.state = 'dead',
LATERAL (SELECT CASE WHEN %(value)s::boolean AND o.state = 'succeeded' THEN {schema}.canvas_size(o.id) <= 64000000 END AS fits) AS size
WHERE c.id = %(id)s::text::uuid
