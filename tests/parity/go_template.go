// Renders templates with Go's own text/template, for test_go_template.py: a JSON list of requests on standard input, a
// JSON list of answers on standard output. A conversation is given to the template as Ollama gives it: messages of one
// role in a row are one, every system prompt is in .System, too, and an unknown variable is empty.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role, Content string
}

type request struct {
	Source   string
	Messages []*message
	Data     map[string]any
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func values(messages []*message) map[string]any {
	var joined []*message
	var system []string
	for _, one := range messages {
		if one.Role == "system" {
			system = append(system, one.Content)
		}
		if last := len(joined) - 1; last >= 0 && joined[last].Role == one.Role {
			joined[last].Content += "\n\n" + one.Content
		} else {
			joined = append(joined, one)
		}
	}
	return map[string]any{
		"System": strings.Join(system, "\n\n"), "Messages": joined, "Tools": []any{}, "Response": "", "Think": false,
	}
}

// whole turns JSON's numbers into integers, where they are some
func whole(value any) any {
	switch value := value.(type) {
	case float64:
		return int(value)
	case []any:
		for i := range value {
			value[i] = whole(value[i])
		}
	case map[string]any:
		for key := range value {
			value[key] = whole(value[key])
		}
	}
	return value
}

func render(asked request) answer {
	made, err := template.New("").Option("missingkey=zero").Parse(asked.Source)
	if err != nil {
		return answer{Error: err.Error()}
	}
	data := any(whole(asked.Data))
	if asked.Messages != nil {
		data = values(asked.Messages)
	}
	var text strings.Builder
	if err := made.Execute(&text, data); err != nil {
		return answer{Error: err.Error()}
	}
	return answer{Text: text.String()}
}

func main() {
	var asked []request
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	answers := make([]answer, len(asked))
	for i, one := range asked {
		answers[i] = render(one)
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(answers); err != nil {
		panic(err)
	}
}
