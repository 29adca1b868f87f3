"""A script by which bash completes `rlver`: commands, their flags, fields of a config, files, and words of a choice.

The script holds every word itself, so that a completion starts no Python.
"""

from collections.abc import Iterable, Iterator, Mapping

from absl import flags

from rlver_jax.config.flags import PathParser
from rlver_jax.config.schema import Field

# Readline takes a word from its last = or : on, so what comes before is cut off again.
_SCRIPT = r"""# Completion of rlver in bash, as `rlver completion bash` prints it. To install it, or after an upgrade:
#   mkdir -p ~/.local/share/bash-completion/completions
#   rlver completion bash > ~/.local/share/bash-completion/completions/rlver
_rlver_words() {  # those of $1 that begin like $2
  COMPREPLY=($(compgen -W "$1" -- "$2"))
  [[ ${COMPREPLY[0]} != *[=.] ]] || compopt -o nospace
}

_rlver_files() {  # files that begin like $1, and those of the words $2
  local IFS=$'\n' before=${1%"${1##*[=:]}"}
  COMPREPLY=($({ compgen -f -- "$1"; compgen -W "$2" -- "$1"; } | sort -u))
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
  compopt -o filenames
}

_rlver() {
  local word=${COMP_LINE:0:COMP_POINT}
  word=${word##*[[:space:]]}
  local value=${word#*=} fields='@fields@'
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    _rlver_words '@commands@ completion --help --version' "$word"
    return
  fi
  case "${COMP_WORDS[1]} $word" in
    'completion '*) _rlver_words bash "$word" ;;
@values@
    *' -'*=*) ;;
@flags@
    *) _rlver_files "$word" '' ;;
  esac
}

complete -F _rlver rlver
"""


def bash_script(commands: Mapping[str, flags.FlagValues], fields: Mapping[str, Field], configs: Iterable[str]) -> str:
    """The script.

    Args:
        commands: with the flags that they define.
        fields: of a config, by their names a.b.
        configs: files that --config takes besides those in the working folder.
    """
    values = [f"    {case} ;;" for command, defined in commands.items() for case in _values(command, defined, configs)]
    for name, field in fields.items():
        words = ("True", "False") if isinstance(field.default, bool) else filter(None, field.choices)
        if offered := " ".join(words):
            values.append(f"    *' --config.{name}='*) _rlver_words '{offered}' \"$value\" ;;")
        elif field.path:
            values.append(f"    *' --config.{name}='*) _rlver_files \"$value\" '' ;;")
    names = []
    for command, defined in commands.items():
        if "config" in defined:
            names.append(f'    \'{command} --config.\'*) _rlver_words "$fields" "$word" ;;')
        names.append(f"    '{command} -'*) _rlver_words '{' '.join(_words(defined))}' \"$word\" ;;")
    texts = {"commands": " ".join(commands), "values": "\n".join(values), "flags": "\n".join(names)}
    texts["fields"] = " ".join(f"--config.{name}=" for name in fields)
    script = _SCRIPT
    for name, text in texts.items():
        script = script.replace(f"@{name}@", text)
    return script


def _values(command: str, defined: flags.FlagValues, configs: Iterable[str]) -> Iterator[str]:
    """A case for each flag whose values can be offered."""
    for name in sorted(defined):
        parser = defined[name].parser
        if isinstance(parser, flags.EnumParser):
            yield f"'{command} --{name}='*) _rlver_words '{' '.join(parser.enum_values)}' \"$value\""
        elif name == "config" or isinstance(parser, PathParser):
            words = "\n".join(configs) if name == "config" else ""
            yield f"'{command} --{name}='*) _rlver_files \"$value\" '{words}'"


def _words(defined: flags.FlagValues) -> list[str]:
    """Flags as they are typed: --name= where a value follows."""
    known = [name for name in sorted(defined) if defined[name].help and name not in ("flagfile", "undefok")]
    return [f"--{name}" + "=" * (not defined[name].boolean) for name in known] + ["--config."] * ("config" in known)
