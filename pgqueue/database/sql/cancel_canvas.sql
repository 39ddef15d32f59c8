-- Cancel what is left of a canvas. Locks: its jobs, in order of id, passing over those that somebody just claims or acks until
-- they are free. One row: cancelled, requested or too_late, and how many waited and how many run.
SELECT answer, cancelled, requested FROM {schema}.cancel_canvas(%(id)s::text::uuid, %(reason)s::text, %(actor)s::text)
