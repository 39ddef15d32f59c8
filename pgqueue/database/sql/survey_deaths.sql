-- Why jobs have died lately: the last `most` of them, by task and reason, the most frequent first. Index: dead_letters_died_at.
SELECT task, reason, count(*) AS jobs, max(error_class) AS error_class
FROM (SELECT task, reason, error_class FROM {schema}.dead_letters
      WHERE died_at > clock_timestamp() - make_interval(secs => %(seconds)s::float8)
      ORDER BY died_at DESC LIMIT %(most)s::integer) AS lately
GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2
