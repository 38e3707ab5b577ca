"""lm-eval as a client of the API, unchanged: `python lm_eval_client.py JOB`, with the extra `clients`.

JOB is JSON: what to ask, and the arguments of its model `local-completions`. The answers come as JSON on the last line.
"""

import json
import sys


def main(job):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = LocalCompletionsAPI(**job["model"])

    def requests(kind, arguments):
        return [Instance(kind, {}, tuple(each), at) for at, each in enumerate(arguments)]

    found = {"likelihoods": model.loglikelihood(requests("loglikelihood", job["choices"])) if job["choices"] else []}
    found["rolling"] = model.loglikelihood_rolling(requests("loglikelihood_rolling", [[each] for each in job["texts"]]))
    found["windows"] = [
        list(
            map(
                make_disjoint_window,
                get_rolling_token_windows(model.tok_encode(each), model.prefix_token_id, model.max_length - 1, 1),
            )
        )
        for each in job["texts"]
    ]
    found["answers"] = model.generate_until(requests("generate_until", job["prompts"])) if job["prompts"] else []
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
